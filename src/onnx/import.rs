//! Reading: from a mapped file to a [`Module`].
//!
//! No weight is copied: `prost` decodes byte fields as slices of the map, and constants refer to those. The graph is
//! taken as ONNX defines it, in topological order; one that is not is refused with the node at fault, since whatever
//! wrote it did not write ONNX. Values of the top graph keep their names; where a nested graph or a function uses a
//! name again, the value gets another one here and its own back in the file.

use super::attributes::{self, kind};
use super::error::{ImportError, Problem, Warning};
use super::external::Folder;
use super::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, ValueInfoProto,
};
use super::rest::{self, DOC, REST};
use super::scan;
use super::{MAX_IR, MAX_OPSET, order, tensors, types};
use crate::files;
use bytes::Bytes;
use dialects::ir::calls::OVERLOAD;
use dialects::ir::{Attr, Attrs, Function, Meta, Module, OpBuilder, OpName, Region, Symbol, Type, Value};
use prost::Message;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

/// The entry of a value that stands under another name in the file.
pub const NAME: &str = "name";

/// The entry of a value with its place among the declared values of its graph, where that is not its own order.
pub const PLACE: &str = "value_info";

/// The prefix of entries of a graph: declarations that belong to no value, by their place.
pub const STRAY: &str = "value_info.";

/// The prefix of entries of a graph: declarations of outputs that differ from that of the value itself.
pub const OUTPUT: &str = "output.";

/// The entry that keeps how operator versions were listed.
pub const OPSETS: &str = "opset_import";

/// A node has no more attributes than this: they are looked up one by one.
pub const MAX_ATTRIBUTES: usize = 4096;

/// A model that was read.
#[derive(Debug)]
pub struct Imported {
    /// The model.
    pub module: Module,
    /// What is odd about it.
    pub warnings: Vec<Warning>,
    /// The files it was read from, and still refers to.
    pub files: Vec<PathBuf>,
}

/// Reads the model at `path`.
pub fn read(path: &Path) -> Result<Imported, ImportError> {
    let at_file = |problem: Problem| ImportError {
        file: path.to_owned(),
        place: String::new(),
        problem: problem.into(),
    };
    let bytes = files::map(path).map_err(|e| at_file(e.into()))?;
    let folder = Folder::of_model(path).map_err(|e| at_file(e.into()))?;
    let mut imported = decode(bytes, path, folder)?;
    imported.files.insert(0, path.to_owned());
    Ok(imported)
}

/// Reads a model from its bytes; it cannot have external data.
pub fn from_bytes(bytes: Bytes) -> Result<Imported, ImportError> {
    decode(bytes, Path::new("model"), Folder::default())
}

fn decode(bytes: Bytes, file: &Path, folder: Folder) -> Result<Imported, ImportError> {
    let at_file = |problem: Problem| ImportError {
        file: file.to_owned(),
        place: String::new(),
        problem: problem.into(),
    };
    let found = scan::scan(&bytes).map_err(|e| at_file(e.into()))?;
    let model = ModelProto::decode(bytes).map_err(|e| at_file(e.into()))?;
    let mut importer = Importer {
        m: Module::default(),
        folder,
        taken: HashSet::new(),
        suffix: HashMap::new(),
        in_function: false,
        scopes: Vec::new(),
        warnings: Vec::new(),
    };
    let unknown = found.unknown.into_iter();
    importer.warnings.extend(unknown.map(|(path, times)| Warning::UnknownField { path, times }));
    importer.model(&model).map_err(|Fault { place, problem }| ImportError {
        file: file.to_owned(),
        place,
        problem: problem.into(),
    })?;
    let files = importer.folder.paths();
    Ok(Imported { module: importer.m, warnings: importer.warnings, files })
}

/// A problem with the place it is at.
pub struct Fault {
    place: String,
    problem: Problem,
}

impl Fault {
    /// `problem` at `place`.
    pub fn at(place: impl Into<String>, problem: impl Into<Problem>) -> Fault {
        Fault { place: place.into(), problem: problem.into() }
    }
}

type Done<T = ()> = Result<T, Fault>;

struct Importer {
    m: Module,
    folder: Folder,
    /// Names of values so far, and those that the top graph will use.
    taken: HashSet<Symbol>,
    /// The last number tried after a name that was taken.
    suffix: HashMap<Symbol, usize>,
    in_function: bool,
    /// Names in sight, the innermost graph last.
    scopes: Vec<HashMap<Symbol, Value>>,
    warnings: Vec<Warning>,
}

impl Importer {
    fn model(&mut self, model: &ModelProto) -> Done {
        let graph = model.graph.as_ref();
        let graph = graph.ok_or_else(|| Fault::at("", Problem::Missing("a graph")))?;
        let (opsets, template) = opsets(&model.opset_import, "")?;
        if opsets.is_empty() {
            self.warnings.push(Warning::NoOpset);
        }
        let opset = opsets.get("onnx").copied().unwrap_or(1);
        self.m.opsets = opsets;
        self.m.ir_version = model.ir_version.unwrap_or(0);
        if self.m.ir_version > MAX_IR {
            self.warnings.push(Warning::NewerIr(self.m.ir_version));
        }
        if opset > MAX_OPSET {
            self.warnings.push(Warning::NewerOpset(opset));
        }
        let mut meta = Meta::default();
        rest::text(&mut meta, "producer_name", &model.producer_name);
        rest::text(&mut meta, "producer_version", &model.producer_version);
        rest::text(&mut meta, "domain", &model.domain);
        rest::text(&mut meta, "model_version", &model.model_version.map(|v| v.to_string()));
        rest::text(&mut meta, DOC, &model.doc_string);
        rest::keep(&mut meta, OPSETS, &template);
        let kept = ModelProto {
            training_info: model.training_info.clone(),
            configuration: model.configuration.clone(),
            metadata_props: rest::metadata(&mut meta, &model.metadata_props),
            ..Default::default()
        };
        rest::keep(&mut meta, REST, &kept);
        self.m.meta = meta;

        // The top graph's names are the model's contract: they are taken before any nested graph can be.
        let names = graph.input.iter().filter_map(|v| v.name.as_deref());
        let names = names.chain(graph.initializer.iter().filter_map(|t| t.name.as_deref()));
        let sparse = graph.sparse_initializer.iter().filter_map(|t| t.values.as_ref()?.name.as_deref());
        let names =
            names.chain(sparse).chain(graph.node.iter().flat_map(|n| n.output.iter().map(String::as_str)));
        self.taken.extend(names.map(Symbol::from));
        let top = self.m.top;
        self.graph(graph, top)?;
        self.in_function = true;
        for function in &model.functions {
            self.function(function)?;
        }
        Ok(())
    }

    fn graph(&mut self, graph: &GraphProto, region: Region) -> Done {
        self.scopes.push(HashMap::new());
        let label = format!("graph {:?}", graph.name.as_deref().unwrap_or_default());
        let mut meta = Meta::default();
        rest::text(&mut meta, DOC, &graph.doc_string);
        let kept = GraphProto {
            name: graph.name.clone().filter(String::is_empty),
            quantization_annotation: graph.quantization_annotation.clone(),
            metadata_props: rest::metadata(&mut meta, &graph.metadata_props),
            ..Default::default()
        };
        rest::keep(&mut meta, REST, &kept);
        self.m.regions[region].name = graph.name.as_deref().unwrap_or_default().into();
        self.m.regions[region].meta = meta;

        for tensor in &graph.initializer {
            let name = tensor.name.as_deref().unwrap_or_default();
            let place = || format!("tensor {name:?}");
            let data = tensors::read(tensor, &mut self.folder).map_err(|e| Fault::at(place(), e))?;
            self.constant(region, name, data, place())?;
        }
        for tensor in &graph.sparse_initializer {
            let name = tensor.values.as_ref().and_then(|v| v.name.as_deref()).unwrap_or_default();
            let place = || format!("sparse tensor {name:?}");
            let data = tensors::read_sparse(tensor, &mut self.folder).map_err(|e| Fault::at(place(), e))?;
            self.constant(region, name, data, place())?;
        }
        let mut args = HashSet::new();
        for info in &graph.input {
            let name = info.name.as_deref().unwrap_or_default();
            if name.is_empty() {
                return Err(Fault::at(label, Problem::Missing("a name of an input")));
            }
            if !args.insert(name) {
                return Err(Fault::at(label, Problem::Twice { what: "input", name: name.to_owned() }));
            }
            let value = match self.own(name) {
                // A constant that is also an input.
                Some(value) => {
                    self.m.regions[region].args.push(value);
                    value
                }
                None => {
                    let (unique, own) = self.unique(name);
                    let value = self.m.add_arg(region, unique, Type::Unknown);
                    self.define(name, value, own);
                    value
                }
            };
            self.declare(value, info)?;
        }

        self.nodes(&graph.node, region)?;

        let mut results = HashSet::new();
        for (i, info) in graph.output.iter().enumerate() {
            let name = info.name.as_deref().unwrap_or_default();
            let problem = || Problem::Undefined { value: name.to_owned() };
            let value =
                self.find(name).ok_or_else(|| Fault::at(format!("output {i} of the {label}"), problem()))?;
            let again = args.contains(name) || !results.insert(value);
            self.m.regions[region].results.push(value);
            let outside = self.own(name).is_none();
            if again || outside {
                // The value has its own declaration: this one is kept where it says something else.
                let own = types::declaration(&self.m.values[value], name);
                if own.as_ref() != Ok(info) {
                    rest::keep(&mut self.m.regions[region].meta, &format!("{OUTPUT}{i}"), info);
                }
            } else {
                self.declare(value, info)?;
            }
        }
        self.declarations(&graph.value_info, region)?;
        self.scopes.pop();
        Ok(())
    }

    fn function(&mut self, function: &FunctionProto) -> Done {
        let name = function.name.as_deref().unwrap_or_default();
        let place = format!("function {name:?}");
        let at = |problem: Problem| Fault::at(place.clone(), problem);
        let op = op_name(function.domain.as_deref(), name).map_err(at)?;
        let (opsets, template) = opsets(&function.opset_import, &place)?;
        let mut meta = Meta::default();
        rest::text(&mut meta, DOC, &function.doc_string);
        rest::keep(&mut meta, OPSETS, &template);
        let kept = FunctionProto {
            domain: function.domain.clone().filter(|d| is_default(d)),
            overload: function.overload.clone().filter(String::is_empty),
            metadata_props: rest::metadata(&mut meta, &function.metadata_props),
            ..Default::default()
        };
        rest::keep(&mut meta, REST, &kept);

        self.scopes.push(HashMap::new());
        let body = self.m.add_region(None);
        for input in &function.input {
            if self.own(input).is_some() {
                return Err(at(Problem::Twice { what: "input", name: input.clone() }));
            }
            let (unique, own) = self.unique(input);
            let value = self.m.add_arg(body, unique, Type::Unknown);
            self.define(input, value, own);
        }
        let defaults = self.attributes(&function.attribute_proto, &mut meta).map_err(|f| Fault {
            place: if f.place.is_empty() { place.clone() } else { f.place },
            problem: f.problem,
        })?;
        self.nodes(&function.node, body)?;
        for output in &function.output {
            let value = self.find(output).ok_or_else(|| at(Problem::Undefined { value: output.clone() }))?;
            self.m.regions[body].results.push(value);
        }
        self.declarations(&function.value_info, body)?;
        self.scopes.pop();
        self.m.functions.push(Function {
            name: op,
            overload: function.overload.as_deref().unwrap_or_default().into(),
            attributes: function.attribute.iter().map(|a| a.as_str().into()).collect(),
            defaults,
            opsets,
            body,
            meta,
        });
        Ok(())
    }

    fn nodes(&mut self, nodes: &[NodeProto], region: Region) -> Done {
        for (i, node) in nodes.iter().enumerate() {
            let at = |problem: Problem| Fault::at(order::label(node), problem);
            let name =
                op_name(node.domain.as_deref(), node.op_type.as_deref().unwrap_or_default()).map_err(at)?;
            let mut operands = Vec::with_capacity(node.input.len());
            for input in &node.input {
                operands.push(match input.as_str() {
                    "" => None,
                    input => {
                        let found = self.find(input);
                        Some(found.ok_or_else(|| at(order::explain(nodes, i, input)))?)
                    }
                });
            }
            let mut meta = Meta::default();
            rest::text(&mut meta, DOC, &node.doc_string);
            rest::text(&mut meta, OVERLOAD, &node.overload.clone().filter(|o| !o.is_empty()));
            let kept = NodeProto {
                name: node.name.clone().filter(String::is_empty),
                domain: node.domain.clone().filter(|d| is_default(d)),
                overload: node.overload.clone().filter(String::is_empty),
                device_configurations: node.device_configurations.clone(),
                metadata_props: rest::metadata(&mut meta, &node.metadata_props),
                ..Default::default()
            };
            rest::keep(&mut meta, REST, &kept);
            let attrs = self.attributes(&node.attribute, &mut meta).map_err(|f| match &f.problem {
                _ if f.place.is_empty() => at(f.problem),
                // Inside a nested graph, what is undefined there may be a value of this graph that comes later.
                Problem::Undefined { value } => match order::explain(nodes, i, value) {
                    Problem::Undefined { .. } => f,
                    better => Fault { place: f.place, problem: better },
                },
                _ => f,
            })?;
            let loc: Symbol = order::location(node).into();
            let mut builder = OpBuilder::named(name, &loc)
                .node(node.name.as_deref().unwrap_or_default())
                .operands(operands);
            builder = builder.attrs(attrs).meta(meta);
            let mut defined = Vec::new();
            let mut outputs = HashSet::new();
            for output in &node.output {
                if output.is_empty() {
                    builder = builder.no_result();
                    continue;
                }
                if self.own(output).is_some() || !outputs.insert(output) {
                    return Err(at(order::two_producers(nodes, i, output)));
                }
                let (unique, own) = self.unique(output);
                builder = builder.named_result(unique, Type::Unknown);
                defined.push((output, own));
            }
            let op = self.m.push(region, builder);
            let results: Vec<Value> = self.m.ops[op].results.iter().copied().flatten().collect();
            for ((output, own), value) in defined.into_iter().zip(results) {
                self.define(output, value, own);
            }
        }
        Ok(())
    }

    /// Reads attributes; what they have no place for goes to `meta`. A fault in them has no place of its own,
    /// unless it is in a nested graph.
    fn attributes(&mut self, protos: &[AttributeProto], meta: &mut Meta) -> Done<Attrs> {
        if protos.len() > MAX_ATTRIBUTES {
            return Err(Fault::at("", Problem::Attributes(protos.len())));
        }
        let mut attrs = Attrs::default();
        for a in protos {
            let name = a.name.as_deref().unwrap_or_default();
            if name.is_empty() {
                return Err(Fault::at("", Problem::Missing("a name of an attribute")));
            }
            if attrs.get(name).is_some() {
                return Err(Fault::at("", Problem::Twice { what: "attribute", name: name.to_owned() }));
            }
            let read = attributes::read(a, &mut self.m, &mut self.folder).map_err(|p| Fault::at("", p))?;
            let attr = match read {
                Some(attr) => attr,
                None if a.kind == Some(kind::GRAPHS) || a.g.is_none() => {
                    let graphs: Done<Vec<Region>> = a.graphs.iter().map(|g| self.nested(g)).collect();
                    Attr::Graphs(graphs?)
                }
                None => match &a.g {
                    Some(g) => Attr::Graph(self.nested(g)?),
                    None => Attr::Graphs(Vec::new()),
                },
            };
            attributes::keep_rest(a, meta);
            attrs.set(name, attr);
        }
        Ok(attrs)
    }

    fn nested(&mut self, graph: &GraphProto) -> Done<Region> {
        let region = self.m.add_region(None);
        self.graph(graph, region)?;
        Ok(region)
    }

    fn constant(&mut self, region: Region, name: &str, data: dialects::ir::ConstData, place: String) -> Done {
        if name.is_empty() {
            return Err(Fault::at(place, Problem::Missing("a name of a constant")));
        }
        if self.own(name).is_some() {
            return Err(Fault::at(place, Problem::Twice { what: "constant", name: name.to_owned() }));
        }
        let (unique, own) = self.unique(name);
        let value = self.m.add_const(region, unique, data);
        self.define(name, value, own);
        Ok(())
    }

    fn declare(&mut self, value: Value, info: &ValueInfoProto) -> Done {
        if info.kind.as_ref().is_some_and(types::ambiguous) {
            let name = info.name.clone().unwrap_or_default();
            return Err(Fault::at("", Problem::AmbiguousType(name)));
        }
        types::declare(&mut self.m.values[value], info);
        Ok(())
    }

    /// Takes the declared types of inner values, and keeps the declarations that belong to none.
    fn declarations(&mut self, infos: &[ValueInfoProto], region: Region) -> Done {
        let data = &self.m.regions[region];
        let mut spoken: HashSet<Value> = data.args.iter().chain(&data.results).copied().collect();
        let mut listed = Vec::new();
        for (i, info) in infos.iter().enumerate() {
            match self.own(info.name.as_deref().unwrap_or_default()) {
                Some(value) if spoken.insert(value) => {
                    self.declare(value, info)?;
                    listed.push((i, value));
                }
                _ => rest::keep(&mut self.m.regions[region].meta, &format!("{STRAY}{i}"), info),
            }
        }
        if !listed.iter().map(|(_, v)| *v).eq(order::declared(&self.m, region)) {
            for (i, value) in listed {
                self.m.values[value].meta.set(PLACE, i.to_string());
            }
        }
        Ok(())
    }

    /// The value called `name` in the innermost graph.
    fn own(&self, name: &str) -> Option<Value> {
        self.scopes.last()?.get(name).copied()
    }

    /// The value called `name` in the innermost graph that has one.
    fn find(&self, name: &str) -> Option<Value> {
        self.scopes.iter().rev().find_map(|s| s.get(name)).copied()
    }

    /// A name for a value called `name`, and whether that is its name in the file. The top graph's names are taken
    /// for it.
    fn unique(&mut self, name: &str) -> (Symbol, bool) {
        let name = Symbol::from(name);
        let top = self.scopes.len() == 1 && !self.in_function;
        if top || self.taken.insert(name.clone()) {
            return (name, true);
        }
        let number = self.suffix.entry(name.clone()).or_default();
        loop {
            *number += 1;
            let other = Symbol::from(format!("{name}_{number}"));
            if self.taken.insert(other.clone()) {
                return (other, false);
            }
        }
    }

    fn define(&mut self, name: &str, value: Value, own: bool) {
        if !own {
            self.m.values[value].meta.set(NAME, name);
        }
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.into(), value);
        }
    }
}

/// Whether a domain is ONNX's own.
fn is_default(domain: &str) -> bool {
    domain.is_empty() || domain == "ai.onnx"
}

/// The dialect of a domain.
fn dialect(domain: Option<&str>) -> Result<&str, Problem> {
    match domain {
        None => Ok("onnx"),
        Some(d) if is_default(d) => Ok("onnx"),
        // The IR's own dialects are no domains of a file.
        Some(d @ ("onnx" | "quant" | "kernel")) => Err(Problem::Domain(d.to_owned())),
        Some(d) => Ok(d),
    }
}

fn op_name(domain: Option<&str>, op: &str) -> Result<OpName, Problem> {
    if op.is_empty() {
        return Err(Problem::Missing("an op type"));
    }
    Ok(OpName::new(dialect(domain)?, op))
}

/// Operator versions by dialect; and the list itself where writing would order or spell it otherwise.
fn opsets(list: &[OperatorSetIdProto], place: &str) -> Done<(BTreeMap<Symbol, i64>, ModelProto)> {
    let mut versions = BTreeMap::new();
    for entry in list {
        let dialect = dialect(entry.domain.as_deref()).map_err(|p| Fault::at(place, p))?;
        let version = entry.version.unwrap_or(0);
        if let Some(first) = versions.insert(Symbol::from(dialect), version)
            && first != version
        {
            let domain = entry.domain.clone().unwrap_or_default();
            return Err(Fault::at(place, Problem::Opset { domain, first, second: version }));
        }
    }
    let mut template = ModelProto::default();
    if order::opset_import(&versions, &[]) != list {
        template.opset_import = list.to_vec();
    }
    Ok((versions, template))
}
