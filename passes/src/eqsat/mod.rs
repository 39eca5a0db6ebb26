//! Equality saturation: exact algebra over windows of the graph, and the only place that names `egg`.
//!
//! A window of ops becomes an e-graph ([`window`], [`lang`]); rules that state equalities over the reals saturate it
//! ([`rules`], [`saturate`]); extraction picks the cheapest way to compute what is read from outside ([`extract`]);
//! the difference goes back into the module ([`apply`]). Nothing is evaluated before the end: constants cost nothing,
//! and conditions ask for facts about them ([`facts`]).
//!
//! Two questions are asked of it. [`place`]: if a value were scaled per channel, could what is upstream absorb that at
//! no cost at run time, and how free is the scale then? [`fold`]: absorb this scale. Method: E-graphs after Nelson
//! (1980) and Willsey et al., "egg: fast and extensible equality saturation" (POPL 2021).

mod apply;
mod cost;
mod edit;
pub mod explain;
mod extract;
mod facts;
mod graph;
mod lang;
mod partition;
pub mod qrw;
mod ranges;
mod rotate;
mod rules;
mod saturate;
mod signature;
#[cfg(test)]
mod tests;
mod whole;
mod window;

use crate::{PassCx, PassError};
pub use cost::{CostModel, Target};
use dialects::ir::{Elem, Module, Op, Type, Value};
use dialects::ops::Ops;
pub use edit::settle;
use extract::{Extraction, Extractor, STEPS};
use facts::Wish;
use graph::{Graph, Id};
pub use lang::is_literal;
pub use ranges::{Between, between};
pub use rotate::{Rotate, fold_rotation};
use rules::RuleSet;
pub use rules::RuleSet as Rules;
use saturate::{Fuel, saturate};
pub use signature::{attrs_text, const_text};
use std::collections::{BTreeMap, BTreeSet, HashMap};
pub use whole::{Rewrite, Rewritten, rewrite};
use window::{Scope, Window};

/// A rule, for people.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RuleInfo {
    /// What it serves: `canonicalize`, `fuse`, or `scales`, which passes that place scales use.
    pub set: &'static str,
    /// Its name.
    pub name: String,
    /// The ops it is about.
    pub ops: Vec<String>,
    /// The rule, where it is text.
    pub text: Option<String>,
}

/// Every rule of the project.
pub fn rules() -> Vec<RuleInfo> {
    let mut out = Vec::new();
    for (set, rules) in [("canonicalize", RuleSet::canonical()), ("scales", RuleSet::scales())] {
        let info = |(name, ops): (String, Vec<String>)| RuleInfo { set, name, ops, text: None };
        out.extend(rules.listed().into_iter().map(info));
    }
    out.extend(rules::fuse_rules().iter().map(|r| RuleInfo {
        set: "fuse",
        name: r.name.clone(),
        ops: rules::Rule::heads(&**r).into_iter().map(str::to_string).collect(),
        text: Some(r.text.clone()),
    }));
    out
}

/// Ties that are tried before a scale counts as without a place.
const ATTEMPTS: usize = 12;

/// Whether and where a scale on a value can be absorbed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// The freedom that the scale has: channels of one class must have one number. `None`: every channel its own.
    pub freedom: Option<Vec<u32>>,
    /// The constants that take it: names of weights, biases and norm gains.
    pub sites: Vec<String>,
    /// Why it cannot be absorbed; `None` when it can.
    pub why_not: Option<String>,
    /// Limits that were hit on the way, with what they leave open.
    pub limits: Vec<String>,
}

/// Asks whether a positive scale per channel (the last dim) of `value` can be absorbed upstream of it at no cost at run
/// time, where the ops `consumers` want `value` scaled and every other reader needs it as it is.
///
/// The types in `m` must be inferred.
pub fn place(m: &Module, ops: &Ops, value: Value, consumers: &[Op]) -> Placement {
    place_along(m, ops, value, Channels::Last, consumers)
}

/// Which dim of a value its channels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channels {
    /// The last: what a matrix multiplies.
    Last,
    /// The second: what a convolution reads.
    Second,
}

impl Channels {
    /// How many channels a value of type `ty` has, and how many dims follow them; `None` when that is unknown.
    pub fn of(self, ty: &Type) -> Option<(usize, usize)> {
        let dims = ty.dims()?;
        let axis = match self {
            Channels::Last => dims.len().checked_sub(1)?,
            Channels::Second => 1,
        };
        let count = usize::try_from(dims.get(axis)?.known()?).ok().filter(|&n| n > 0)?;
        Some((count, dims.len() - 1 - axis))
    }
}

/// [`place`] for channels that need not be the last dim.
pub fn place_along(m: &Module, ops: &Ops, value: Value, along: Channels, consumers: &[Op]) -> Placement {
    let not = |why: String| Placement { why_not: Some(why), ..Placement::default() };
    let label = m.value_label(value);
    if !m.ty(value).elem().is_some_and(|e| e.is_float()) {
        return not(format!("{label:?} is no float tensor"));
    }
    let Some((channels, _)) = along.of(m.ty(value)) else {
        return not(format!("the number of channels of {label:?} is unknown"));
    };
    let Some((op, _)) = m.def_op(value) else { return not(format!("{label:?} is an input")) };
    let scope = Scope::new(m, m.ops[op].region);
    let window = scope.upstream(value, consumers);

    let free: Vec<u32> = (0..channels as u32).collect();
    let mut limits = Vec::new();
    let mut tried: BTreeSet<Vec<u32>> = BTreeSet::new();
    // Ties are tried in the order found, the freest first: the fewer channels are tied, the more a scale can do.
    let mut queue: BTreeMap<(std::cmp::Reverse<usize>, usize), Vec<u32>> = BTreeMap::new();
    queue.insert((std::cmp::Reverse(channels), 0), free.clone());
    while let Some((_, classes)) = queue.pop_first() {
        if tried.len() >= ATTEMPTS {
            limits
                .push(format!("{label:?}: {ATTEMPTS} ways of tying channels were tried, more are possible"));
            break;
        }
        if !tried.insert(classes.clone()) {
            continue;
        }
        let attempt = attempt(m, ops, &window, value, along, &classes);
        limits.extend(attempt.limit.map(|l| format!("window of {label:?}: stopped at {l}")));
        if let Some(sites) = attempt.sites {
            let freedom = (classes != free).then_some(classes);
            return Placement { freedom, sites, why_not: None, limits };
        }
        for wish in attempt.wishes {
            let tied = tie(&classes, &wish);
            let count = distinct(&tied);
            // One number for all channels is no scale worth searching for.
            if count > 1 {
                queue.insert((std::cmp::Reverse(count), tried.len() * 1000 + queue.len()), tied);
            }
        }
    }
    let mut why: Vec<String> = window.stops.iter().take(3).cloned().collect();
    if window.limited {
        limits.push(format!("window of {label:?}: cut at {} ops", window::LARGEST));
    }
    if why.is_empty() {
        why.push("no constant upstream can take it at no cost".into());
    }
    Placement { limits, ..not(why.join("; ")) }
}

struct Attempt {
    /// The constants that take the scale, when it is absorbed.
    sites: Option<Vec<String>>,
    wishes: Vec<Wish>,
    limit: Option<String>,
}

/// Asks for one way of tying channels.
fn attempt(
    m: &Module,
    ops: &Ops,
    window: &Window,
    value: Value,
    along: Channels,
    classes: &[u32],
) -> Attempt {
    let solved = solve(m, ops, window, value, along, classes);
    let sites = solved.with.as_ref().map(|x| apply::sites(&solved.g, x));
    let mut wishes = solved.g.wishes.borrow().clone();
    wishes.sort();
    let unsearched = (!solved.searched && sites.is_none()).then(|| "the steps of the exact search".into());
    Attempt { sites, wishes, limit: solved.limit.or(unsearched) }
}

/// A window in which a value is multiplied by a symbolic scale.
struct Solved<'a> {
    g: Graph<'a>,
    /// How to compute it at no more than it costs without the scale.
    with: Option<Extraction>,
    /// Whether the search for that was exact.
    searched: bool,
    /// What ran out.
    limit: Option<String>,
}

/// Multiplies `value`, the window's first root or an input of it, by a symbolic scale of the classes given.
fn solve<'a>(
    m: &'a Module,
    ops: &'a Ops,
    window: &Window,
    value: Value,
    along: Channels,
    classes: &[u32],
) -> Solved<'a> {
    let mut g = Graph::new(m, ops);
    let plain = window.build(&mut g);
    let mut scale = g.scale(classes, m.ty(value).elem().unwrap_or(Elem::F32));
    if let Some((count, behind @ 1..)) = along.of(m.ty(value)) {
        let mut dims = vec![1; behind + 1];
        dims[0] = count;
        scale = g.reshaped(scale, &dims);
    }
    let roots = match window.roots.first() == Some(&value) {
        true => {
            let mut roots = plain.clone();
            roots[0] = g.op("onnx.Mul", &[roots[0], scale]);
            roots
        }
        false => {
            let bare = g.leaf(value);
            let product = g.op("onnx.Mul", &[bare, scale]);
            window.build_on(&mut g, HashMap::from([(value, product)]))
        }
    };
    let limit = saturate(&mut g, Fuel::default(), RuleSet::scales());
    let extractor = Extractor::new(&g, &CostModel::BYTES);
    let without = extractor.best(&plain, None, STEPS);
    let with = without.as_ref().and_then(|w| extractor.best(&roots, Some(w.cost), STEPS));
    let searched = [&without, &with].into_iter().flatten().all(|x| x.optimal);
    drop(extractor);
    Solved { g, with, searched, limit }
}

/// The partition in which the classes of each set of the wish are one, numbered in order of appearance.
fn tie(classes: &[u32], wish: &Wish) -> Vec<u32> {
    let most = classes.iter().copied().max().map_or(0, |c| c as usize + 1);
    let mut parent: Vec<usize> = (0..most).collect();
    fn root(parent: &[usize], mut i: usize) -> usize {
        while parent[i] != i {
            i = parent[i];
        }
        i
    }
    for set in &wish.0 {
        for pair in set.windows(2) {
            let (a, b) = (root(&parent, pair[0] as usize), root(&parent, pair[1] as usize));
            parent[a.max(b)] = a.min(b);
        }
    }
    let mut names: BTreeMap<usize, u32> = BTreeMap::new();
    let name = |c: &u32| {
        let next = names.len() as u32;
        *names.entry(root(&parent, *c as usize)).or_insert(next)
    };
    classes.iter().map(name).collect()
}

fn distinct(classes: &[u32]) -> usize {
    classes.iter().collect::<BTreeSet<_>>().len()
}

/// What folding did.
#[derive(Clone, Debug, Default)]
pub struct FoldOutcome {
    /// The constants that were computed anew, by the names of those they are made from. Empty: nothing changed.
    pub sites: Vec<String>,
    /// The cost of the window before and after, in the units of the cost model.
    pub cost: (u64, u64),
    /// Whether the multiplication is gone: what is left costs no more than if it had not been there.
    pub absorbed: bool,
    /// Why it ended where it did, when it was not absorbed.
    pub why_not: Option<String>,
    /// Limits that were hit.
    pub limits: Vec<String>,
}

/// Absorbs the product with a constant that defines `product` into constants upstream, if that makes the model cheaper.
///
/// The types in `m` must be inferred.
pub fn fold_window(m: &mut Module, ops: &Ops, product: Value) -> Result<FoldOutcome, String> {
    fold_in(m, ops, product, |scope, readers| scope.upstream(product, readers))
}

/// Absorbs the product with a constant that defines `product` into the weights of the ops that read it, if that makes
/// the model cheaper.
///
/// The types in `m` must be inferred.
pub fn fold_into_readers(m: &mut Module, ops: &Ops, product: Value) -> Result<FoldOutcome, String> {
    fold_in(m, ops, product, |scope, _| scope.around(product))
}

fn fold_in(
    m: &mut Module,
    ops: &Ops,
    product: Value,
    window: impl Fn(&Scope, &[Op]) -> Window,
) -> Result<FoldOutcome, String> {
    let Some((mul, _)) = m.def_op(product) else { return Err("the value is not computed".into()) };
    let region = m.ops[mul].region;
    let (plan, mut outcome) = {
        let scope = Scope::new(m, region);
        let window = window(&scope, &scope.readers(product));
        let mut g = Graph::new(m, ops);
        let roots = window.build(&mut g);
        let limit = saturate(&mut g, Fuel::default(), RuleSet::scales());
        let in_window: BTreeSet<Op> = window.ops.iter().copied().collect();
        let own =
            g.values.iter().filter(|(v, _, _)| m.def_op(*v).is_some_and(|(o, _)| in_window.contains(&o)));
        let before: u64 = own.map(|(_, id, node)| CostModel::BYTES.of(&g, *id, node)).sum();
        let extractor = Extractor::new(&g, &CostModel::BYTES);
        let best = extractor.best(&roots, None, STEPS).ok_or("the window cannot be extracted")?;
        let mut outcome = FoldOutcome { cost: (before, best.cost), ..FoldOutcome::default() };
        outcome.absorbed = match window.roots.contains(&product) {
            true => {
                let bare = without_product(m, mul, &g, &window, &roots, &extractor);
                bare.is_some_and(|b| best.cost <= b.cost)
            }
            false => best.cost < before,
        };
        outcome
            .limits
            .extend(limit.map(|l| format!("window of {:?}: stopped at {l}", m.value_label(product))));
        if !outcome.absorbed {
            let why: Vec<String> = window.stops.iter().take(3).cloned().collect();
            outcome.why_not = Some(why.join("; "));
        }
        if best.cost >= before {
            outcome.cost.1 = before;
            return Ok(outcome);
        }
        (apply::plan(&g, &scope, &window, &roots, &best)?, outcome)
    };
    outcome.sites = plan.apply(m, region).map_err(|e| e.to_string())?;
    Ok(outcome)
}

/// The best extraction of a window upstream of a product if the product had not been there.
fn without_product(
    m: &Module,
    mul: Op,
    g: &Graph,
    window: &Window,
    roots: &[Id],
    extractor: &Extractor,
) -> Option<Extraction> {
    let factor = scaled_operand(m, mul)?;
    let bare = g.values.iter().find(|(v, _, _)| *v == factor).map(|(_, id, _)| *id)?;
    let product = m.ops[mul].result(0)?;
    let roots: Vec<Id> =
        window.roots.iter().zip(roots).map(|(&v, &id)| if v == product { bare } else { id }).collect();
    extractor.best(&roots, None, STEPS)
}

/// The factor of a product with a constant that is not the constant.
fn scaled_operand(m: &Module, mul: Op) -> Option<Value> {
    let data = &m.ops[mul];
    let mut operands = data.operands.iter().flatten().copied();
    match data.name.as_str() {
        "onnx.Mul" => operands.find(|v| m.const_of(*v).is_none()),
        "onnx.Div" => operands.next(),
        _ => None,
    }
}

/// Absorbs the `Mul(value, constant)` that a pass inserted. When it cannot be absorbed whole, that is an error, unless the
/// settings allow it to stay.
pub fn fold(m: &mut Module, cx: &mut PassCx, mul: Op, pass: &'static str) -> Result<(), PassError> {
    let at = |m: &Module, why: String| PassError::At { pass, what: m.ops[mul].loc.to_string(), why };
    let Some(product) = m.ops[mul].result(0) else { return Err(at(m, "the product has no result".into())) };
    let outcome = fold_window(m, cx.ops, product).map_err(|why| at(m, why))?;
    for limit in &outcome.limits {
        cx.report.note(limit.clone());
    }
    cx.count(if outcome.absorbed { "fold.absorbed" } else { "fold.left" }, 1);
    if !outcome.absorbed && !cx.settings.allow_mul {
        let why = outcome.why_not.unwrap_or_default();
        return Err(at(m, format!("this is a bug in the pass: a scale was not absorbed: {why}")));
    }
    Ok(())
}
