//! The module: arenas of values, ops and regions, and the edits that keep them consistent.
//!
//! Invariants (the verifier checks them): a value has one definition; an op belongs to one region and stands
//! after the definitions of its operands; a nested region may use values of the regions around it; a value
//! that is a result of the top region keeps its name, since that name is the model's contract.

use super::literal::{Quoted, is_word};
use super::{Attr, Attrs, ConstData, ConstId, ConstPool, Dim, Type};
use cranelift_entity::{PrimaryMap, entity_impl};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

/// A shared, immutable name.
pub type Symbol = Arc<str>;

/// A value: a graph input, a constant, or a result of an op.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(u32);
entity_impl!(Value, "v");

/// An op.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Op(u32);
entity_impl!(Op, "op");

/// A graph: the model's own, an If or Loop body, or a function's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Region(u32);
entity_impl!(Region, "region");

/// An op's name with its dialect: `onnx.MatMul`, `com.microsoft.MatMulNBits`, `quant.dequantize`.
/// The dialect is the ONNX domain, with `onnx` for the default one.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpName {
    full: Symbol,
    dialect_len: usize,
}

impl OpName {
    /// The op `op` of `dialect`. Neither is empty.
    pub fn new(dialect: &str, op: &str) -> OpName {
        OpName { full: format!("{dialect}.{op}").into(), dialect_len: dialect.len() }
    }

    /// `dialect.op`, split at the last dot; `None` without one.
    pub fn parse(full: &str) -> Option<OpName> {
        let dot = full.rfind('.')?;
        (dot > 0 && dot + 1 < full.len()).then(|| OpName { full: full.into(), dialect_len: dot })
    }

    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.full
    }

    /// The name as the text form writes it: in two quoted parts where it is no plain word or would split elsewhere.
    pub fn text(&self) -> String {
        let plain = is_word(&self.full) && OpName::parse(&self.full).as_ref() == Some(self);
        match plain {
            true => self.full.to_string(),
            false => format!("{}.{}", Quoted(self.dialect().as_bytes()), Quoted(self.op().as_bytes())),
        }
    }

    /// The dialect, such as `onnx` or `com.microsoft`.
    pub fn dialect(&self) -> &str {
        &self.full[..self.dialect_len]
    }

    /// The op type, such as `MatMul`.
    pub fn op(&self) -> &str {
        &self.full[self.dialect_len + 1..]
    }
}

impl fmt::Display for OpName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.full)
    }
}

impl fmt::Debug for OpName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.full)
    }
}

/// Fields that qcc carries but does not interpret: documentation strings, `metadata_props` (as `metadata.<key>`),
/// denotations. Ordered; a key occurs once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta(pub Vec<(Symbol, Symbol)>);

impl Meta {
    /// The field `key`.
    pub fn get(&self, key: &str) -> Option<&Symbol> {
        self.0.iter().find(|(k, _)| &**k == key).map(|(_, v)| v)
    }

    /// Sets the field `key`, keeping its place when it is there already.
    pub fn set(&mut self, key: impl Into<Symbol>, value: impl Into<Symbol>) {
        let key = key.into();
        match self.0.iter_mut().find(|(k, _)| *k == key) {
            Some(slot) => slot.1 = value.into(),
            None => self.0.push((key, value.into())),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueDef {
    /// Result number `.1` of an op.
    Result(Op, usize),
    /// An input of a region.
    Arg(Region),
    /// A constant (an ONNX initializer). It may also stand among the region's inputs.
    Const(ConstId),
    /// Nothing any more: its op was erased.
    Erased,
}

/// One value.
#[derive(Clone, Debug)]
pub struct ValueData {
    /// The name, unique in the module; empty when it needs none.
    pub name: Symbol,
    /// What is known of its type: what the file declared, refined by inference.
    pub ty: Type,
    /// The type as the file declared it, to be written back. `None` for a value that was not declared.
    pub declared: Option<Type>,
    /// Small integer contents, row-major, where inference knows them (shape arithmetic).
    pub sym: Option<Arc<[Dim]>>,
    /// The definition.
    pub def: ValueDef,
    /// Fields carried along.
    pub meta: Meta,
}

/// One op.
#[derive(Clone, Debug)]
pub struct OpData {
    /// Dialect and op type.
    pub name: OpName,
    /// The ONNX node's own name, written back as it was; may be empty.
    pub node: Symbol,
    /// The source node that messages name: the node's name, or its first output's where it has none. An op that
    /// a pass creates inherits that of the op it replaces.
    pub loc: Symbol,
    /// Operands; `None` is one left out.
    pub operands: Vec<Option<Value>>,
    /// Results; `None` is one that nobody wants.
    pub results: Vec<Option<Value>>,
    /// Attributes, nested graphs included.
    pub attrs: Attrs,
    /// The region it stands in.
    pub region: Region,
    /// Fields carried along.
    pub meta: Meta,
}

impl OpData {
    /// Operand `i`, if it is there.
    pub fn operand(&self, i: usize) -> Option<Value> {
        self.operands.get(i).copied().flatten()
    }

    /// Result `i`, if somebody may want it.
    pub fn result(&self, i: usize) -> Option<Value> {
        self.results.get(i).copied().flatten()
    }

    /// Whether the op is `full`, such as `onnx.MatMul`.
    pub fn is(&self, full: &str) -> bool {
        self.name.as_str() == full
    }
}

/// One region.
#[derive(Clone, Debug, Default)]
pub struct RegionData {
    /// The graph's name.
    pub name: Symbol,
    /// Inputs in order.
    pub args: Vec<Value>,
    /// Constants (initializers) in order.
    pub consts: Vec<Value>,
    /// Ops, each after the definitions it uses.
    pub ops: Vec<Op>,
    /// Outputs in order.
    pub results: Vec<Value>,
    /// The op that holds the region; `None` for the top one and function bodies.
    pub parent: Option<Op>,
    /// Fields carried along.
    pub meta: Meta,
}

/// A model-local function: an op defined by a graph.
#[derive(Clone, Debug)]
pub struct Function {
    /// The op it defines.
    pub name: OpName,
    /// ONNX's `overload`; may be empty.
    pub overload: Symbol,
    /// Attributes that a call must give.
    pub attributes: Vec<Symbol>,
    /// Attributes with defaults.
    pub defaults: Attrs,
    /// Opset versions its body is written against.
    pub opsets: BTreeMap<Symbol, i64>,
    /// The body.
    pub body: Region,
    /// Fields carried along.
    pub meta: Meta,
}

/// A use of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Operand number `.1` of an op.
    Operand(Op, usize),
    /// Output number `.1` of a region.
    Result(Region, usize),
}

/// The uses of every value, as they were when it was made.
#[derive(Clone, Debug, Default)]
pub struct Uses(HashMap<Value, Vec<Use>>);

impl Uses {
    /// The uses of `value`, in program order.
    pub fn of(&self, value: Value) -> &[Use] {
        self.0.get(&value).map_or(&[], Vec::as_slice)
    }
}

/// A program: the model's graph with all that hangs on it.
#[derive(Clone, Debug)]
pub struct Module {
    /// All ops, erased ones included.
    pub ops: PrimaryMap<Op, OpData>,
    /// All values, erased ones included.
    pub values: PrimaryMap<Value, ValueData>,
    /// All regions.
    pub regions: PrimaryMap<Region, RegionData>,
    /// All constants.
    pub consts: ConstPool,
    /// The model's graph.
    pub top: Region,
    /// Model-local functions.
    pub functions: Vec<Function>,
    /// Opset version by dialect.
    pub opsets: BTreeMap<Symbol, i64>,
    /// ONNX's `ir_version`.
    pub ir_version: i64,
    /// The model's other fields (producer, documentation, metadata).
    pub meta: Meta,
}

impl Default for Module {
    fn default() -> Module {
        let mut regions = PrimaryMap::new();
        let top = regions.push(RegionData::default());
        Module {
            ops: PrimaryMap::new(),
            values: PrimaryMap::new(),
            regions,
            consts: PrimaryMap::new(),
            top,
            functions: Vec::new(),
            opsets: BTreeMap::new(),
            ir_version: 10,
            meta: Meta::default(),
        }
    }
}

/// Describes an op to insert: `OpBuilder::new("onnx.Mul", &loc).operands([a, b]).attr("axis", 1)`.
#[derive(Clone, Debug)]
pub struct OpBuilder {
    name: OpName,
    node: Symbol,
    loc: Symbol,
    operands: Vec<Option<Value>>,
    attrs: Attrs,
    meta: Meta,
    results: Vec<Option<(Symbol, Type)>>,
}

impl OpBuilder {
    /// An op `full` (such as `onnx.Mul`) that comes from the source node `loc`.
    pub fn new(full: &str, loc: &Symbol) -> OpBuilder {
        OpBuilder::named(OpName::parse(full).expect("an op name has a dialect"), loc)
    }

    /// The same, for a name that was parsed already.
    pub fn named(name: OpName, loc: &Symbol) -> OpBuilder {
        OpBuilder {
            name,
            node: "".into(),
            loc: loc.clone(),
            operands: Vec::new(),
            attrs: Attrs::default(),
            meta: Meta::default(),
            results: Vec::new(),
        }
    }

    /// The ONNX node's own name.
    pub fn node(mut self, node: impl Into<Symbol>) -> Self {
        self.node = node.into();
        self
    }

    /// Adds operands.
    pub fn operands<V: Into<Option<Value>>>(mut self, operands: impl IntoIterator<Item = V>) -> Self {
        self.operands.extend(operands.into_iter().map(Into::into));
        self
    }

    /// Sets an attribute.
    pub fn attr(mut self, name: &str, value: impl Into<Attr>) -> Self {
        self.attrs.set(name, value.into());
        self
    }

    /// Replaces all attributes.
    pub fn attrs(mut self, attrs: Attrs) -> Self {
        self.attrs = attrs;
        self
    }

    /// Sets the fields carried along.
    pub fn meta(mut self, meta: Meta) -> Self {
        self.meta = meta;
        self
    }

    /// Adds an unnamed result.
    pub fn result(self, ty: Type) -> Self {
        self.named_result("", ty)
    }

    /// Adds a result with a name.
    pub fn named_result(mut self, name: impl Into<Symbol>, ty: Type) -> Self {
        self.results.push(Some((name.into(), ty)));
        self
    }

    /// Adds a result that nobody wants.
    pub fn no_result(mut self) -> Self {
        self.results.push(None);
        self
    }
}

impl Module {
    /// Adds a value that is defined elsewhere; prefer `add_arg`, `add_const` and `insert`.
    fn add_value(&mut self, name: Symbol, ty: Type, def: ValueDef) -> Value {
        self.values.push(ValueData { name, ty, declared: None, sym: None, def, meta: Meta::default() })
    }

    /// Adds an empty region held by `parent` (set its attribute too), or a free one.
    pub fn add_region(&mut self, parent: Option<Op>) -> Region {
        self.regions.push(RegionData { parent, ..RegionData::default() })
    }

    /// Adds an input to a region.
    pub fn add_arg(&mut self, region: Region, name: impl Into<Symbol>, ty: Type) -> Value {
        let v = self.add_value(name.into(), ty, ValueDef::Arg(region));
        self.regions[region].args.push(v);
        v
    }

    /// Adds a constant to a region.
    pub fn add_const(&mut self, region: Region, name: impl Into<Symbol>, data: ConstData) -> Value {
        let ty = data.ty();
        let id = self.consts.push(data);
        let v = self.add_value(name.into(), ty, ValueDef::Const(id));
        self.regions[region].consts.push(v);
        v
    }

    /// Adds an op at the end of a region.
    pub fn push(&mut self, region: Region, op: OpBuilder) -> Op {
        let at = self.regions[region].ops.len();
        self.insert_at(region, at, op)
    }

    /// Adds an op before another one.
    pub fn insert_before(&mut self, before: Op, op: OpBuilder) -> Op {
        let region = self.ops[before].region;
        let at = self.position(before);
        self.insert_at(region, at, op)
    }

    /// Adds an op after another one.
    pub fn insert_after(&mut self, after: Op, op: OpBuilder) -> Op {
        let region = self.ops[after].region;
        let at = self.position(after) + 1;
        self.insert_at(region, at, op)
    }

    fn insert_at(&mut self, region: Region, at: usize, b: OpBuilder) -> Op {
        let op = self.ops.push(OpData {
            name: b.name,
            node: b.node,
            loc: b.loc,
            operands: b.operands,
            results: Vec::new(),
            attrs: b.attrs,
            region,
            meta: b.meta,
        });
        let results = b.results.into_iter().enumerate();
        let results = results
            .map(|(i, r)| r.map(|(name, ty)| self.add_value(name, ty, ValueDef::Result(op, i))))
            .collect();
        self.ops[op].results = results;
        let nested: Vec<Region> = self.ops[op].attrs.regions().collect();
        for r in nested {
            self.regions[r].parent = Some(op);
        }
        self.regions[region].ops.insert(at, op);
        op
    }

    fn position(&self, op: Op) -> usize {
        let ops = &self.regions[self.ops[op].region].ops;
        ops.iter().position(|&o| o == op).expect("a live op stands in its region")
    }

    /// Removes an op. Its results must have no uses left.
    pub fn erase(&mut self, op: Op) {
        let at = self.position(op);
        let region = self.ops[op].region;
        self.regions[region].ops.remove(at);
        for v in self.ops[op].results.iter().flatten() {
            self.values[*v].def = ValueDef::Erased;
        }
    }

    /// Makes every use of `old` a use of `new`. When `old` is an output of its graph, `new` takes over its name
    /// and declaration, and `old` is left without a name.
    pub fn replace_uses(&mut self, old: Value, new: Value) {
        for data in self.ops.values_mut() {
            for operand in data.operands.iter_mut().flatten() {
                if *operand == old {
                    *operand = new;
                }
            }
        }
        let mut output = false;
        for data in self.regions.values_mut() {
            for r in &mut data.results {
                if *r == old {
                    *r = new;
                    output = true;
                }
            }
        }
        if output {
            let name = std::mem::replace(&mut self.values[old].name, "".into());
            let declared = self.values[old].declared.take();
            let meta = std::mem::take(&mut self.values[old].meta);
            let v = &mut self.values[new];
            v.name = name;
            v.declared = declared;
            v.meta = meta;
        }
    }

    /// The uses of every value, in live ops and regions.
    pub fn uses(&self) -> Uses {
        let mut map: HashMap<Value, Vec<Use>> = HashMap::new();
        for region in self.live_regions() {
            for &op in &self.regions[region].ops {
                for (i, v) in self.ops[op].operands.iter().enumerate() {
                    if let Some(v) = v {
                        map.entry(*v).or_default().push(Use::Operand(op, i));
                    }
                }
            }
            for (i, v) in self.regions[region].results.iter().enumerate() {
                map.entry(*v).or_default().push(Use::Result(region, i));
            }
        }
        Uses(map)
    }

    /// The top region, function bodies, and every region nested in their ops, outer before inner.
    pub fn live_regions(&self) -> Vec<Region> {
        let mut out = vec![self.top];
        out.extend(self.functions.iter().map(|f| f.body));
        let mut i = 0;
        while i < out.len() {
            for &op in &self.regions[out[i]].ops {
                out.extend(self.ops[op].attrs.regions());
            }
            i += 1;
        }
        out
    }

    /// Every live op, region by region in program order.
    pub fn live_ops(&self) -> Vec<Op> {
        self.live_regions().into_iter().flat_map(|r| self.regions[r].ops.iter().copied()).collect()
    }

    /// The op that defines `value`, with the number of the result.
    pub fn def_op(&self, value: Value) -> Option<(Op, usize)> {
        match self.values[value].def {
            ValueDef::Result(op, i) => Some((op, i)),
            _ => None,
        }
    }

    /// The constant behind `value`: an initializer, or the tensor of an `onnx.Constant`.
    pub fn const_of(&self, value: Value) -> Option<ConstId> {
        match self.values[value].def {
            ValueDef::Const(c) => Some(c),
            ValueDef::Result(op, 0) if self.ops[op].is("onnx.Constant") => self.ops[op].attrs.tensor("value"),
            _ => None,
        }
    }

    /// Whether `op` gives a constant, which is read where it is used.
    pub fn is_const(&self, op: Op) -> bool {
        self.ops[op].result(0).is_some_and(|v| self.const_of(v).is_some())
    }

    /// The type of a value.
    pub fn ty(&self, value: Value) -> &Type {
        &self.values[value].ty
    }

    /// The opset version a dialect is imported at, 1 when it is not.
    pub fn opset(&self, dialect: &str) -> i64 {
        self.opsets.get(dialect).copied().unwrap_or(1)
    }

    /// A name that no value has, made from `hint`.
    pub fn fresh_name(&self, hint: &str) -> Symbol {
        let taken = |n: &str| self.values.values().any(|v| &*v.name == n);
        if !hint.is_empty() && !taken(hint) {
            return hint.into();
        }
        (1..).map(|i| format!("{hint}_{i}")).find(|n| !taken(n)).expect("numbers do not run out").into()
    }

    /// How messages name a value: its name, or its number.
    pub fn value_label(&self, value: Value) -> String {
        match &*self.values[value].name {
            "" => value.to_string(),
            name => name.to_string(),
        }
    }
}
