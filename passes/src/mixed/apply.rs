//! Makes the choices: one run of a quantizing pass for all the weights that have one choice; `gptq`, which leads the data
//! through what is quantized already, takes all of its weights in one run.

use super::NAME;
use super::choice::Choice;
use crate::gptq::Gptq;
use crate::group::in_program_order;
use crate::quantize::{Shared, candidates};
use crate::{Filter, Pass, PassCx, PassError, Report, WeightReport};
use dialects::ir::Module;

/// Quantizes each of the weights as chosen; without a choice it stays float, for the reason given. `weights` are those
/// of `m`, or of the module that it is a copy of.
pub(super) fn apply(
    m: &mut Module,
    cx: &mut PassCx,
    weights: &[Shared],
    chosen: &[Result<Choice, String>],
) -> Result<(), PassError> {
    let first = cx.report.weights.len();
    let mut done: Vec<&Choice> = Vec::new();
    for choice in chosen.iter().flatten() {
        if *choice == Choice::Float || choice.gptq().is_some() || done.contains(&choice) {
            continue;
        }
        done.push(choice);
        let is = |i: &usize| chosen[*i].as_ref() == Ok(choice);
        let wanted: Vec<usize> = (0..weights.len()).filter(is).collect();
        run(m, cx, weights, &wanted, &choice.to_string(), |filter| choice.pass(filter))?;
    }
    let grid = |i: usize| chosen[i].as_ref().ok().and_then(Choice::gptq);
    let wanted: Vec<usize> = (0..weights.len()).filter(|&i| grid(i).is_some()).collect();
    if let Some(&one) = wanted.first() {
        let each = wanted.iter().filter_map(|&i| Some((weights[i].label(m), grid(i)?))).collect();
        let options = grid(one).unwrap_or_default();
        let gptq = Gptq { each, options, ..Gptq::default() };
        run(m, cx, weights, &wanted, "gptq", |filter| {
            Ok(Some(Box::new(Gptq { filter: filter.clone(), ..gptq })))
        })?;
    }
    for (w, choice) in weights.iter().zip(chosen) {
        let why = match choice {
            Ok(Choice::Float) => "the choice for it is float",
            Ok(_) => continue,
            Err(why) => why.as_str(),
        };
        w.uses.iter().for_each(|l| cx.left(m, l.op, why));
    }
    in_program_order(m, cx, first);
    Ok(())
}

/// Runs the pass of one choice on the weights `wanted`, and on no others.
fn run(
    m: &mut Module,
    cx: &mut PassCx,
    weights: &[Shared],
    wanted: &[usize],
    choice: &str,
    pass: impl FnOnce(&Filter) -> Result<Option<Box<dyn Pass>>, String>,
) -> Result<(), PassError> {
    let labels: Vec<String> = wanted.iter().map(|&w| weights[w].label(m)).collect();
    let at = |i: usize, why: String| PassError::At { pass: NAME, what: labels[i].clone(), why };
    let filter = names(m, cx, weights, wanted).map_err(|why| at(0, why))?;
    let Some(pass) = pass(&filter).map_err(PassError::Env)? else { return Ok(()) };
    let from = cx.report.weights.len();
    match pass.run(m, cx) {
        Ok(_) | Err(PassError::Nothing { .. }) => {}
        Err(e) => return Err(e),
    }
    let done = &cx.report.weights[from..];
    let node = |w: usize| &*m.ops[weights[w].first().op].loc;
    let is = |i: usize, r: &WeightReport| r.weight == labels[i] && r.node == node(wanted[i]);
    if let Some(i) = (0..wanted.len()).find(|&i| !done.iter().any(|r| is(i, r))) {
        let said = cx.report.left.iter().find(|l| *l.node == *node(wanted[i]));
        let why = said.map_or_else(|| "it has no such form".to_string(), |l| l.why.clone());
        return Err(at(i, format!("the choice {choice} cannot be made: {why}")));
    }
    if done.len() > wanted.len() {
        return Err(at(0, format!("this is a bug: the choice {choice} was made for other weights too")));
    }
    Ok(())
}

/// A filter that lets a pass touch the weights `wanted` alone: by their names, or else by those of their nodes.
fn names(m: &Module, cx: &PassCx, weights: &[Shared], wanted: &[usize]) -> Result<Filter, String> {
    let mut report = Report::default();
    let mut all = PassCx { report: &mut report, rest: &[], ..*cx };
    let others: Vec<Shared> = candidates(m, &mut all, &Filter::default(), true);
    // An LSTM has two weights.
    let place = |w: &Shared| (w.first().op, w.first().operand_index);
    let others = others.iter().filter(|o| !wanted.iter().any(|&w| place(&weights[w]) == place(o)));
    let others: Vec<&Shared> = others.collect();
    let reached = |f: &Filter, w: &Shared| {
        let refused = |d: &dialects::ir::OpData| f.refuses(&[&d.node, &d.loc, &w.label(m)], &d.name);
        w.uses.iter().any(|l| refused(&m.ops[l.op]).is_none())
    };
    let labels = wanted.iter().map(|&w| weights[w].label(m)).collect();
    let nodes = wanted.iter().flat_map(|&w| &weights[w].uses).map(|l| m.ops[l.op].loc.to_string()).collect();
    let mut also = String::new();
    for only in [labels, nodes] {
        let filter = Filter { only, skip: Vec::new() };
        match others.iter().find(|w| reached(&filter, w)) {
            None => return Ok(filter),
            Some(other) => also = other.label(m),
        }
    }
    Err(format!("no name tells it from the weight {also:?}, which has another choice"))
}
