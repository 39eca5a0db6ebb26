//! Writing: from a [`Module`] to a file, tensors streamed one at a time.
//!
//! Each message is put together from its own small fields and the ropes of those inside it (see [`super::rope`]).
//! Output over 1 GiB, or when asked, puts its larger tensors in one sidecar file beside the model. Files
//! appear whole or not at all. Nothing stands beside an output that is no plain file: there all is in one.

use super::attributes;
use super::external::{SIDECAR_MIN, Sidecar};
use super::import::{NAME, OPSETS, OUTPUT, STRAY};
use super::order;
use super::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, ValueInfoProto,
};
use super::rest::{self, DOC, REST};
use super::rope::{Rope, RopeError};
use super::tensors;
use super::types;
use crate::files::{self, FileError, OutputFile};
use dialects::ir::calls::OVERLOAD;
use dialects::ir::{
    Attr, ConstData, ConstError, ConstId, Elem, Encoding, Function, Meta, Module, Op, Region, Symbol, Value,
};
use prost::Message;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Output of more bytes has a sidecar file.
const SIDECAR_FROM: u64 = 1 << 30;

/// What Protocol Buffers can hold in one message.
const MESSAGE_MAX: u64 = (1 << 31) - 1;

/// Why a module cannot be written.
#[derive(Debug, Error)]
pub enum ExportError {
    /// A file cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A tensor cannot be read.
    #[error("tensor {tensor:?}: {source}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// Why.
        source: ConstError,
    },
    /// The module holds an op that ONNX does not have.
    #[error("{op} at node {loc:?} has no ONNX form: a pass that packs it must run first")]
    NotOnnx {
        /// The op.
        op: String,
        /// Its source node.
        loc: String,
    },
    /// Metadata of a module is not what reading a model leaves there.
    #[error("{place}: {reason}")]
    Meta {
        /// The op, value or graph.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// The model without its sidecar is still too large.
    #[error("the model takes {0} bytes without its large tensors, and Protocol Buffers hold {MESSAGE_MAX}")]
    TooLarge(u64),
    /// The model is too large for one file, and there is no place for a second one.
    #[error(
        "the model takes {0} bytes, Protocol Buffers hold {MESSAGE_MAX}, and no second file fits beside {1}"
    )]
    NoSidecar(u64, PathBuf),
}

/// How to write.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Put larger tensors in a sidecar file even when the model is small.
    pub external_data: bool,
    /// Files that must not be overwritten: those that the module was read from.
    pub inputs: Vec<PathBuf>,
}

/// Files that were written, with their lengths.
#[derive(Clone, Debug, PartialEq)]
pub struct Written(pub Vec<(PathBuf, u64)>);

/// Writes a module to `path`, and to `path.data` when it has a sidecar. `progress` is told bytes written, of how many.
pub fn write(
    m: &Module,
    path: &Path,
    options: &Options,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, ExportError> {
    files::refuse_overwrite(path, &options.inputs)?;
    let (rope, sidecar) = plan(m, path, options)?;
    let total = rope.len() + sidecar.as_ref().map_or(0, |s| s.len);
    let mut done = 0;
    let mut tell = |bytes: u64| {
        done += bytes;
        progress(done, total);
    };
    let mut written = vec![(path.to_owned(), rope.len())];
    let mut model = OutputFile::create(path)?;
    // The data first: a model is never in place without it.
    if let Some(sidecar) = sidecar {
        let data_path = path.with_file_name(&sidecar.name);
        files::refuse_overwrite(&data_path, &options.inputs)?;
        let mut data = OutputFile::create(&data_path)?;
        let result = write_sidecar(&sidecar, &mut data, &mut tell);
        result.map_err(|e| failed(e, &data, "the sidecar"))?;
        let result = rope.write(&mut model, &mut tell);
        result.map_err(|e| failed(e, &model, "the model"))?;
        data.commit()?;
        written.push((data_path, sidecar.len));
    } else {
        rope.write(&mut model, &mut tell).map_err(|e| failed(e, &model, "the model"))?;
    }
    model.commit()?;
    Ok(Written(written))
}

/// Bytes that [`write()`] would write to `path`, all files together.
pub fn len(m: &Module, path: &Path, options: &Options) -> Result<u64, ExportError> {
    let (rope, sidecar) = plan(m, path, options)?;
    Ok(rope.len() + sidecar.map_or(0, |s| s.len))
}

/// What goes into the model's file, and what into a sidecar.
fn plan(m: &Module, path: &Path, options: &Options) -> Result<(Rope, Option<Sidecar>), ExportError> {
    let mut writer = Writer::new(m, None)?;
    let plain = std::fs::metadata(path).map_or(true, |m| m.is_file());
    let external = options.external_data && plain;
    let mut rope = if external { Rope::default() } else { writer.model()? };
    if external || plain && rope.len() > SIDECAR_FROM {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        writer.sidecar = Some(Sidecar::new(format!("{name}.data")));
        rope = writer.model()?;
    }
    if rope.len() > MESSAGE_MAX {
        return Err(match plain {
            true => ExportError::TooLarge(rope.len()),
            false => ExportError::NoSidecar(rope.len(), path.to_owned()),
        });
    }
    Ok((rope, writer.sidecar.filter(|s| s.len > 0)))
}

fn failed(error: RopeError, file: &OutputFile, part: &str) -> ExportError {
    match error {
        RopeError::Io(e) => ExportError::File(file.error(e)),
        RopeError::Tensor(source) => ExportError::Tensor { tensor: part.to_owned(), source },
    }
}

fn write_sidecar(
    sidecar: &Sidecar,
    out: &mut impl Write,
    progress: &mut dyn FnMut(u64),
) -> Result<(), RopeError> {
    let mut at = 0;
    for (offset, tensor) in &sidecar.tensors {
        io::copy(&mut io::Read::take(io::repeat(0), offset - at), out)?;
        let data = tensor.read()?;
        let (expected, found) = (tensor.byte_len(), data.len() as u64);
        if expected != found {
            return Err(ConstError::Length { expected, found }.into());
        }
        out.write_all(&data)?;
        progress(offset + found - at);
        at = offset + found;
    }
    Ok(())
}

/// The whole model as bytes, everything in one file.
pub fn to_bytes(m: &Module) -> Result<Vec<u8>, ExportError> {
    let mut bytes = Vec::new();
    let written = Writer::new(m, None)?.model()?.write(&mut bytes, &mut |_| {});
    match written {
        Ok(()) => Ok(bytes),
        Err(RopeError::Tensor(source)) => Err(ExportError::Tensor { tensor: "the model".to_owned(), source }),
        // A vector takes every byte.
        Err(RopeError::Io(e)) => {
            Err(ExportError::File(FileError::Io { doing: "write", path: PathBuf::new(), source: e }))
        }
    }
}

struct Writer<'a> {
    m: &'a Module,
    names: HashMap<Value, Symbol>,
    sidecar: Option<Sidecar>,
}

impl<'a> Writer<'a> {
    fn new(m: &'a Module, sidecar: Option<Sidecar>) -> Result<Writer<'a>, ExportError> {
        let mut writer = Writer { m, names: HashMap::new(), sidecar };
        writer.name_region(m.top, &mut Vec::new());
        for function in &m.functions {
            writer.name_region(function.body, &mut Vec::new());
        }
        Ok(writer)
    }

    /// Names the values of a region and of those inside it: as the file had them, made unique where passes brought
    /// two of a name in sight of each other, and made up where there is none.
    fn name_region(&mut self, region: Region, scopes: &mut Vec<HashSet<Symbol>>) {
        let data = &self.m.regions[region];
        let mut values: Vec<Value> = data.args.clone();
        values.extend(&data.consts);
        values.extend(data.ops.iter().flat_map(|&op| self.m.ops[op].results.iter().copied().flatten()));
        // Names of the module come first: those of a graph's outputs are its contract.
        values.sort_by_key(|v| {
            let value = &self.m.values[*v];
            (value.name.is_empty(), value.meta.get(NAME).is_some())
        });
        scopes.push(HashSet::new());
        for v in values {
            if self.names.contains_key(&v) {
                continue;
            }
            let value = &self.m.values[v];
            let taken = |name: &Symbol| name.is_empty() || scopes.iter().any(|s| s.contains(name));
            let base = match (&*value.name, self.m.def_op(v)) {
                ("", Some((op, i))) => format!("{}_output_{i}", self.m.ops[op].loc).into(),
                ("", None) => Symbol::from("value"),
                _ => value.name.clone(),
            };
            let wanted = value.meta.get(NAME).cloned().into_iter().chain([base.clone()]);
            let numbered = (1..).map(|i| format!("{base}_{i}").into());
            let name = wanted.chain(numbered).find(|n| !taken(n)).expect("numbers do not run out");
            if let Some(scope) = scopes.last_mut() {
                scope.insert(name.clone());
            }
            self.names.insert(v, name);
        }
        for &op in &data.ops {
            for nested in self.m.ops[op].attrs.regions() {
                self.name_region(nested, scopes);
            }
        }
        scopes.pop();
    }

    fn name(&self, v: Value) -> String {
        self.names.get(&v).map_or_else(|| self.m.value_label(v), |n| n.to_string())
    }

    fn model(&mut self) -> Result<Rope, ExportError> {
        let m = self.m;
        let at = |reason| ExportError::Meta { place: "the model".to_owned(), reason };
        let mut proto: ModelProto = rest::kept(&m.meta, REST).map_err(at)?;
        let template: ModelProto = rest::kept(&m.meta, OPSETS).map_err(at)?;
        proto.ir_version = (m.ir_version != 0).then_some(m.ir_version);
        proto.opset_import = order::opset_import(&self.versions(&m.opsets, m.top), &template.opset_import);
        proto.producer_name = rest::text_of(&m.meta, "producer_name");
        proto.producer_version = rest::text_of(&m.meta, "producer_version");
        proto.domain = rest::text_of(&m.meta, "domain");
        proto.model_version = m.meta.get("model_version").and_then(|v| v.parse().ok());
        proto.doc_string = rest::text_of(&m.meta, DOC);
        proto.metadata_props.extend(rest::metadata_of(&m.meta));
        let mut rope = Rope::of(&proto);
        let graph = self.graph(m.top)?;
        rope.message(7, graph);
        for function in &m.functions {
            let function = self.function(function)?;
            rope.message(25, function);
        }
        Ok(rope)
    }

    /// Operator versions for a graph: those there are, and version 1 of the domains of ops that passes brought in.
    fn versions(&self, known: &BTreeMap<Symbol, i64>, region: Region) -> BTreeMap<Symbol, i64> {
        let mut versions = known.clone();
        let mut regions = vec![region];
        while let Some(region) = regions.pop() {
            for &op in &self.m.regions[region].ops {
                let data = &self.m.ops[op];
                if !versions.contains_key(data.name.dialect()) {
                    versions.insert(data.name.dialect().into(), 1);
                }
                regions.extend(data.attrs.regions());
            }
        }
        versions
    }

    fn graph(&mut self, region: Region) -> Result<Rope, ExportError> {
        let m = self.m;
        let data = &m.regions[region];
        let at = |reason| ExportError::Meta { place: format!("graph {:?}", data.name), reason };
        let mut proto: GraphProto = rest::kept(&data.meta, REST).map_err(at)?;
        if !data.name.is_empty() {
            proto.name = Some(data.name.to_string());
        }
        proto.doc_string = rest::text_of(&data.meta, DOC);
        proto.metadata_props.extend(rest::metadata_of(&data.meta));
        for &v in &data.args {
            proto.input.push(self.declaration(v)?);
        }
        let mut others: BTreeMap<usize, ValueInfoProto> = rest::numbered(&data.meta, OUTPUT).map_err(at)?;
        for (i, &v) in data.results.iter().enumerate() {
            let own = self.declaration(v)?;
            let other = others.remove(&i).filter(|other| other.name == own.name);
            proto.output.push(other.unwrap_or(own));
        }
        proto.value_info = self.inner_declarations(region)?;
        let mut rope = Rope::of(&proto);
        for &v in &data.consts {
            let dialects::ir::ValueDef::Const(id) = m.values[v].def else { continue };
            let name = self.name(v);
            if m.consts[id].encoding == Encoding::Sparse {
                let tensor = sparse(&m.consts[id], Some(&name))?;
                rope.message(15, Rope::of(&tensor));
            } else {
                let tensor = self.tensor(&m.consts[id], Some(name), true)?;
                rope.message(5, tensor);
            }
        }
        for &op in &data.ops {
            let node = self.node(op)?;
            rope.message(1, node);
        }
        Ok(rope)
    }

    fn function(&mut self, function: &Function) -> Result<Rope, ExportError> {
        let m = self.m;
        let body = &m.regions[function.body];
        let at = |reason| ExportError::Meta { place: format!("function {}", function.name), reason };
        let mut proto: FunctionProto = rest::kept(&function.meta, REST).map_err(at)?;
        let template: ModelProto = rest::kept(&function.meta, OPSETS).map_err(at)?;
        proto.name = Some(function.name.op().to_owned());
        if function.name.dialect() != "onnx" {
            proto.domain = Some(function.name.dialect().to_owned());
        }
        if !function.overload.is_empty() {
            proto.overload = Some(function.overload.to_string());
        }
        let versions = self.versions(&function.opsets, function.body);
        proto.opset_import = order::opset_import(&versions, &template.opset_import);
        proto.doc_string = rest::text_of(&function.meta, DOC);
        proto.metadata_props.extend(rest::metadata_of(&function.meta));
        proto.attribute = function.attributes.iter().map(|a| a.to_string()).collect();
        proto.input = body.args.iter().map(|&v| self.name(v)).collect();
        proto.output = body.results.iter().map(|&v| self.name(v)).collect();
        proto.value_info = self.inner_declarations(function.body)?;
        let mut rope = Rope::of(&proto);
        for (name, attr) in function.defaults.iter() {
            let attribute = self.attribute(name, attr, &function.meta)?;
            rope.message(11, attribute);
        }
        // A function has no initializers: its constants are nodes.
        for &v in &body.consts {
            let dialects::ir::ValueDef::Const(id) = m.values[v].def else { continue };
            let constant = NodeProto {
                op_type: Some("Constant".to_owned()),
                output: vec![self.name(v)],
                ..Default::default()
            };
            let mut node = Rope::of(&constant);
            node.message(5, self.attribute("value", &Attr::Tensor(id), &Meta::default())?);
            rope.message(7, node);
        }
        for &op in &body.ops {
            let node = self.node(op)?;
            rope.message(7, node);
        }
        Ok(rope)
    }

    fn node(&mut self, op: Op) -> Result<Rope, ExportError> {
        let data = &self.m.ops[op];
        if matches!(data.name.dialect(), "quant" | "kernel") {
            let (op, loc) = (data.name.to_string(), data.loc.to_string());
            return Err(ExportError::NotOnnx { op, loc });
        }
        let at = |reason| ExportError::Meta { place: format!("node {:?}", data.loc), reason };
        let mut proto: NodeProto = rest::kept(&data.meta, REST).map_err(at)?;
        let name = |v: &Option<Value>| v.map_or_else(String::new, |v| self.name(v));
        proto.input = data.operands.iter().map(name).collect();
        proto.output = data.results.iter().map(name).collect();
        if !data.node.is_empty() {
            proto.name = Some(data.node.to_string());
        }
        proto.op_type = Some(data.name.op().to_owned());
        if data.name.dialect() != "onnx" {
            proto.domain = Some(data.name.dialect().to_owned());
        }
        proto.doc_string = rest::text_of(&data.meta, DOC);
        proto.overload = rest::text_of(&data.meta, OVERLOAD).or(proto.overload);
        proto.metadata_props.extend(rest::metadata_of(&data.meta));
        let mut rope = Rope::of(&proto);
        for (name, attr) in data.attrs.iter() {
            let attribute = self.attribute(name, attr, &data.meta)?;
            rope.message(5, attribute);
        }
        Ok(rope)
    }

    fn attribute(&mut self, name: &str, attr: &Attr, meta: &Meta) -> Result<Rope, ExportError> {
        let m = self.m;
        let at = |reason| ExportError::Meta { place: format!("attribute {name:?}"), reason };
        let kept: AttributeProto = rest::kept(meta, &attributes::rest_key(name)).map_err(at)?;
        let mut rope = Rope::of(&attributes::message(m, name, attr, kept));
        let (tensors, graphs): (Vec<ConstId>, Vec<Region>) = match attr {
            Attr::Tensor(id) => (vec![*id], Vec::new()),
            Attr::Tensors(ids) => (ids.clone(), Vec::new()),
            Attr::Graph(r) => (Vec::new(), vec![*r]),
            Attr::Graphs(rs) => (Vec::new(), rs.clone()),
            _ => return Ok(rope),
        };
        let one = matches!(attr, Attr::Tensor(_) | Attr::Graph(_));
        for id in tensors {
            let data = &m.consts[id];
            if data.encoding == Encoding::Sparse {
                let tensor = sparse(data, None)?;
                rope.message(if one { 22 } else { 23 }, Rope::of(&tensor));
            } else {
                let name = rest::text_of(&data.meta, tensors::NAME);
                let tensor = self.tensor(data, name, false)?;
                rope.message(if one { 5 } else { 10 }, tensor);
            }
        }
        for region in graphs {
            let graph = self.graph(region)?;
            rope.message(if one { 6 } else { 11 }, graph);
        }
        Ok(rope)
    }

    /// A dense tensor. Only an `initializer` may be external: runtimes read tensors in attributes as they parse.
    fn tensor(
        &mut self,
        data: &ConstData,
        name: Option<String>,
        initializer: bool,
    ) -> Result<Rope, ExportError> {
        let label = name.clone().unwrap_or_default();
        let at = |reason| ExportError::Meta { place: format!("tensor {label:?}"), reason };
        let read = |source| ExportError::Tensor { tensor: label.clone(), source };
        let mut proto = tensors::message(data, name).map_err(at)?;
        let large = initializer && data.elem != Elem::String && data.byte_len() >= SIDECAR_MIN;
        if let Some(sidecar) = self.sidecar.as_mut().filter(|_| large) {
            sidecar.refer(&mut proto, data.source.clone());
            return Ok(Rope::of(&proto));
        }
        if data.encoding == Encoding::Typed || data.elem == Elem::String {
            tensors::fill_typed(&mut proto, data.elem, &data.read().map_err(read)?);
            return Ok(Rope::of(&proto));
        }
        let mut rope = Rope::of(&proto);
        rope.tensor(9, data.source.clone()).map_err(read)?;
        Ok(rope)
    }

    fn declaration(&self, v: Value) -> Result<ValueInfoProto, ExportError> {
        let name = self.name(v);
        types::declaration(&self.m.values[v], &name)
            .map_err(|reason| ExportError::Meta { place: format!("value {name:?}"), reason })
    }

    /// The declarations of inner values, with those that belong to none in their places between them.
    fn inner_declarations(&self, region: Region) -> Result<Vec<ValueInfoProto>, ExportError> {
        let mut list = Vec::new();
        for v in order::declared(self.m, region) {
            list.push(self.declaration(v)?);
        }
        let meta = &self.m.regions[region].meta;
        let strays: BTreeMap<usize, ValueInfoProto> = rest::numbered(meta, STRAY).map_err(|reason| {
            ExportError::Meta { place: format!("graph {:?}", self.m.regions[region].name), reason }
        })?;
        let mut declared = list.into_iter();
        let mut list = Vec::new();
        for (place, info) in strays {
            list.extend(declared.by_ref().take(place - list.len().min(place)));
            list.push(info);
        }
        list.extend(declared);
        Ok(list)
    }
}

/// The message of a sparse tensor, with the name of its values when it is an initializer.
fn sparse(data: &ConstData, name: Option<&str>) -> Result<SparseTensorProto, ExportError> {
    let label = || name.unwrap_or_default().to_owned();
    let bytes = data.read().map_err(|source| ExportError::Tensor { tensor: label(), source })?;
    let decoded = SparseTensorProto::decode(bytes);
    let mut tensor = decoded
        .map_err(|e| ExportError::Meta { place: format!("tensor {:?}", label()), reason: e.to_string() })?;
    if let (Some(name), Some(values)) = (name, &mut tensor.values) {
        values.name = Some(name.to_owned());
    }
    Ok(tensor)
}
