//! Order: the one that ONNX wants of a graph, with an explanation where it is broken, and those in which lists
//! without a meaning of their own are written.

use super::error::Problem;
use super::import::PLACE;
use super::proto::{GraphProto, NodeProto, OperatorSetIdProto};
use dialects::ir::{Module, Region, Symbol, Value};
use std::collections::{BTreeMap, HashMap, HashSet};

/// How messages call a node: by its name, or by its first output.
pub fn label(node: &NodeProto) -> String {
    let op = node.op_type.as_deref().unwrap_or("no op type");
    match node.name.as_deref() {
        Some(name) if !name.is_empty() => format!("node {name:?} ({op})"),
        _ => format!("the node of {:?} ({op})", location(node)),
    }
}

/// The location of the op that a node becomes: the node's name, or its first output's.
pub fn location(node: &NodeProto) -> &str {
    let name = node.name.as_deref().filter(|n| !n.is_empty());
    name.or_else(|| node.output.iter().map(String::as_str).find(|o| !o.is_empty())).unwrap_or_default()
}

/// Why node number `at`, which reads `value`, finds no definition before it.
pub fn explain(nodes: &[NodeProto], at: usize, value: &str) -> Problem {
    let mut producers: HashMap<&str, usize> = HashMap::new();
    for (i, node) in nodes.iter().enumerate() {
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            producers.entry(output).or_insert(i);
        }
    }
    let value = value.to_owned();
    let Some(&producer) = producers.get(value.as_str()) else { return Problem::Undefined { value } };
    // Follow what the producer reads: where that leads back here, the nodes wait for each other.
    let mut reader: HashMap<usize, usize> = HashMap::new();
    let mut stack = vec![producer];
    let mut seen = HashSet::from([producer]);
    while let Some(i) = stack.pop() {
        if i == at {
            let mut path = vec![label(&nodes[at])];
            let mut i = at;
            while i != producer {
                i = reader[&i];
                path.push(label(&nodes[i]));
            }
            path.push(label(&nodes[at]));
            return Problem::Cycle(path);
        }
        let mut inputs = Vec::new();
        reads(&nodes[i], &mut inputs);
        for next in inputs.iter().filter_map(|name| producers.get(name)) {
            if seen.insert(*next) {
                reader.insert(*next, i);
                stack.push(*next);
            }
        }
    }
    Problem::UsedBeforeDefined { value, producer: label(&nodes[producer]) }
}

/// Every name that a node reads, itself or in its nested graphs.
fn reads<'a>(node: &'a NodeProto, out: &mut Vec<&'a str>) {
    out.extend(node.input.iter().map(String::as_str));
    for a in &node.attribute {
        let graphs: Vec<&GraphProto> = a.g.as_deref().into_iter().chain(&a.graphs).collect();
        for graph in graphs {
            graph.node.iter().for_each(|n| reads(n, out));
            out.extend(graph.output.iter().filter_map(|o| o.name.as_deref()));
        }
    }
}

/// The fault of node number `at`, whose output `value` is defined already.
pub fn two_producers(nodes: &[NodeProto], at: usize, value: &str) -> Problem {
    let first = nodes[..at].iter().find(|n| n.output.iter().any(|o| o == value));
    let first = match first {
        Some(node) => label(node),
        None if nodes[at].output.iter().filter(|o| *o == value).count() > 1 => label(&nodes[at]),
        None => "an input or a constant".to_owned(),
    };
    Problem::TwoProducers { value: value.to_owned(), first, second: label(&nodes[at]) }
}

/// The declared inner values of a region, in the order they are written: as the file had them, or else constants
/// first and then results in program order.
pub fn declared(m: &Module, region: Region) -> Vec<Value> {
    let data = &m.regions[region];
    let outer: HashSet<Value> = data.args.iter().chain(&data.results).copied().collect();
    let results = data.ops.iter().flat_map(|&op| m.ops[op].results.iter().copied().flatten());
    let inner = data.consts.iter().copied().chain(results);
    let mut list: Vec<Value> =
        inner.filter(|v| m.values[*v].declared.is_some() && !outer.contains(v)).collect();
    let place = |v: &Value| m.values[*v].meta.get(PLACE).and_then(|p| p.parse().ok()).unwrap_or(usize::MAX);
    list.sort_by_key(place);
    list
}

/// Operator versions as a list: in the order and the spelling of `template`, the others after it.
pub fn opset_import(
    versions: &BTreeMap<Symbol, i64>,
    template: &[OperatorSetIdProto],
) -> Vec<OperatorSetIdProto> {
    let dialect = |domain: Option<&str>| match domain {
        None | Some("" | "ai.onnx") => "onnx".to_owned(),
        Some(d) => d.to_owned(),
    };
    let mut list = Vec::new();
    let mut done = HashSet::new();
    for entry in template {
        let dialect = dialect(entry.domain.as_deref());
        if let Some(&version) = versions.get(dialect.as_str()) {
            list.push(OperatorSetIdProto { domain: entry.domain.clone(), version: Some(version) });
            done.insert(dialect);
        }
    }
    let mut others: Vec<_> = versions.iter().filter(|(d, _)| !done.contains(&***d)).collect();
    others.sort_by_key(|(d, _)| &***d != "onnx");
    for (dialect, &version) in others {
        let domain = if &**dialect == "onnx" { String::new() } else { dialect.to_string() };
        list.push(OperatorSetIdProto { domain: Some(domain), version: Some(version) });
    }
    list
}
