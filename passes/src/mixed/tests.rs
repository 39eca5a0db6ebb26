//! The search on a model whose distances are made up, so that the best recipe is known by trying all.

use super::*;
use crate::qtensor::QTensor;
use crate::testing::NoData;
use crate::{CalibSink, Distance, Env, Progress, Scratch, Settings};
use dialects::ir::{ConstData, Dim, Elem, OpBuilder, Type, Value};
use dialects::ops::Ops;
use dialects::tensor::Tensor;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the weight `w{i}` is worth.
const WORTH: [f64; 10] = [8.0, 1.0, 5.0, 2.0, 13.0, 0.5, 3.0, 21.0, 1.5, 6.0];

/// An outside world where every quantized weight adds a share of what it is worth to the divergence.
#[derive(Default)]
struct World {
    measured: AtomicUsize,
    /// What weights of different bits do to each other, beyond what each does alone.
    discord: f64,
}

/// What is left to a weight's bits.
fn share(bits: u32) -> f64 {
    match bits {
        2 => 1.0,
        4 => 0.125,
        8 => 0.0078125,
        _ => 0.0,
    }
}

fn kl(m: &Module) -> f64 {
    let mut sum = 0.0;
    for op in m.live_ops() {
        let Some(v) = m.ops[op].operand(1) else { continue };
        let worth = |label: &str| WORTH[label[1..].parse::<usize>().unwrap()];
        if let Some((q, placed)) = QTensor::of(m, v) {
            sum += worth(&placed.label) * share(q.bits);
        }
    }
    sum / 64.0
}

/// Whether all ten weights are quantized, but not alike.
fn unlike(m: &Module) -> bool {
    let bits = m.live_ops().into_iter().filter_map(|op| Some(QTensor::of(m, m.ops[op].operand(1)?)?.0.bits));
    let bits: Vec<u32> = bits.collect();
    bits.len() == 10 && bits.iter().any(|b| *b != bits[0])
}

impl Env for World {
    fn calibrate(&self, m: &Module, wanted: &[Value], sink: &mut CalibSink) -> Result<(), PassError> {
        NoData.calibrate(m, wanted, sink)
    }
    fn distance(&self, m: &Module) -> Result<Distance, PassError> {
        self.measured.fetch_add(1, Ordering::Relaxed);
        let (kl, before) = (kl(m) + if unlike(m) { self.discord } else { 0.0 }, 20.0);
        let perplexity = Some(before * (1.0 + kl));
        Ok(Distance { kl, error: None, perplexity, baseline_perplexity: Some(before), positions: 64 })
    }
    /// Constants, and something for ops and for the first op of its kind.
    fn file_bytes(&self, m: &Module) -> Result<u64, PassError> {
        let ops = m.live_ops();
        let packed = ops.iter().any(|&op| m.ops[op].is("com.microsoft.MatMulNBits"));
        let consts = m.regions[m.top].consts.iter().filter_map(|&v| m.const_of(v));
        let bytes: u64 = consts.map(|c| m.consts[c].byte_len()).sum();
        Ok(bytes + 50 * ops.len() as u64 + if packed { 33 } else { 0 })
    }
    fn scratch(&self, len: usize) -> Result<Box<dyn Scratch>, PassError> {
        NoData.scratch(len)
    }
    fn progress(&self, task: &str, total: u64) -> Box<dyn Progress> {
        NoData.progress(task, total)
    }
}

/// Ten products in a row, `[16, 32]` to `[48, 16]`; the last two read one value. `tied` makes the fourth weight that of
/// the first.
fn model(tied: bool) -> Module {
    let mut m = Module { ir_version: 10, ..Module::default() };
    m.opsets.insert("onnx".into(), 21);
    let top = m.top;
    let width = |i: usize| 16 + i % 3 * 16;
    let ty = |n: usize| Type::tensor(Elem::F32, [Dim::Known(4), Dim::Known(n as i64)]);
    let mut x = m.add_arg(top, "x", ty(16));
    let mut first = None;
    for i in 0..10 {
        let (k, n) = (width(i.min(8)), width(i.min(8) + 1));
        let values: Vec<f32> = (0..k * n).map(|j| ((j * 7 + i * 13) % 31) as f32 / 16.0 - 0.9).collect();
        let data: ConstData = Tensor::new(&[k, n], values).unwrap().to_const();
        let w = match (first, tied && i == 3) {
            (Some(w), true) => w,
            _ => m.add_const(top, format!("w{i}"), data),
        };
        first = first.or(Some(w));
        let loc = format!("/node{i}").as_str().into();
        let op = OpBuilder::new("onnx.MatMul", &loc).operands([x, w]).named_result(format!("y{i}"), ty(n));
        let op = m.push(top, op);
        let y = m.ops[op].result(0).unwrap();
        if i >= 8 {
            m.regions[top].results.push(y);
        } else {
            x = y;
        }
    }
    m
}

fn run(pass: &Mixed, m: &mut Module, world: &World) -> Result<Report, PassError> {
    let (ops, settings, mut report) = (Ops::standard(), Settings::default(), Report::default());
    let rest: [&dyn Pass; 1] = [&crate::pack_int4::PackInt4::default()];
    let mut cx = PassCx { ops: &ops, env: world, settings: &settings, report: &mut report, rest: &rest };
    pass.run(m, &mut cx)?;
    // The rest of the pipeline.
    rest[0].run(m, &mut cx)?;
    crate::dce::sweep(m);
    Ok(report)
}

fn mixed(options: serde_json::Value) -> Mixed {
    serde_json::from_value(options).unwrap()
}

const CHOICES: [&str; 3] = ["2/16", "4/16", "8/16"];

/// Bytes of an `[n, k]` weight in `bits` bits and groups of 16, by hand: codes, a scale of 4 bytes for each group, and
/// zero points packed by rows.
fn packed_bytes(n: u64, k: u64, bits: u64) -> u64 {
    let groups = k.div_ceil(16);
    n * (groups * 16 * bits / 8 + groups * 4 + (groups * bits).div_ceil(8))
}

/// By trying all: the least cost of ten layers within a budget of bytes.
fn brute_force(budget: u64) -> Option<f64> {
    let width = |i: usize| 16 + i as u64 % 3 * 16;
    let size = |i: usize| (width(i.min(8) + 1), width(i.min(8)));
    let mut best: Option<f64> = None;
    for code in 0..3usize.pow(10) {
        let pick = |i: usize| [2u64, 4, 8][code / 3usize.pow(i as u32) % 3];
        let bytes: u64 = (0..10).map(|i| packed_bytes(size(i).0, size(i).1, pick(i))).sum();
        let cost: f64 = (0..10).map(|i| WORTH[i] * share(pick(i) as u32)).sum::<f64>() / 64.0;
        if bytes <= budget && best.is_none_or(|b| cost < b) {
            best = Some(cost);
        }
    }
    best
}

#[test]
fn ten_layers_equal_brute_force() {
    let elements: u64 = (0..10).map(|i: u64| (16 + i.min(8) % 3 * 16) * (16 + (i.min(8) + 1) % 3 * 16)).sum();
    for bits in [4.4, 5.0, 6.1, 7.7, 11.0] {
        let (mut m, world) = (model(false), World::default());
        let options = serde_json::json!({"budget": bits, "choices": CHOICES});
        let report = run(&mixed(options.clone()), &mut m, &world).unwrap();
        // One measurement for each layer and choice, one for each choice, and the result before and after it is made.
        assert_eq!(world.measured.into_inner(), 10 * 3 + 3 + 2);
        let budget = (bits * elements as f64 / 8.0) as u64;
        let mix = report.mix.unwrap();
        assert_eq!(mix.weights, elements);
        let wanted = brute_force(budget).unwrap();
        assert!((mix.taken.predicted - wanted).abs() < 1e-12, "{bits}: {} {wanted}", mix.taken.predicted);
        // The prediction is true of this world, and bytes are those that were written.
        assert!((mix.taken.measured.unwrap().kl - wanted).abs() < 1e-12);
        let written: u64 = report.weights.iter().map(|w| w.bytes_after).sum();
        assert_eq!(written, mix.taken.bytes);
        assert!(written <= budget && mix.taken.bits <= bits);
        let greedy = mix.other.unwrap();
        assert!(greedy.predicted >= mix.taken.predicted && greedy.bytes <= budget);

        let greedy_first = mixed(serde_json::json!({"budget": bits, "choices": CHOICES, "solver": "greedy"}));
        let again = run(&greedy_first, &mut model(false), &World::default()).unwrap().mix.unwrap();
        assert_eq!((again.taken.picks, again.other.unwrap().picks), (greedy.picks, mix.taken.picks));
    }
}

/// Where costs do not add up, a model with one choice for all layers may be better, and is known to be.
#[test]
fn a_wrong_prediction_is_not_taken() {
    let (mut m, world) = (model(false), World { discord: 5.0, ..World::default() });
    let report = run(&mixed(serde_json::json!({"budget": 7.5, "choices": CHOICES})), &mut m, &world).unwrap();
    assert!(report.weights.iter().all(|w| w.bits == 4), "{:?}", report.weights);
    assert!(
        report.warnings.iter().any(|w| w.contains("4/16/rtn for all layers measures")),
        "{:?}",
        report.warnings
    );
    let mix = report.mix.unwrap();
    assert!(mix.taken.bits <= 7.5 && !mix.exact && mix.taken.measured.unwrap().kl < 1.0);
}

#[test]
fn a_recipe_replays_to_the_same_codes() {
    let options = serde_json::json!({"budget": 6.0, "choices": ["2/16", "4/16", "8/32", 16]});
    let (mut m, world) = (model(false), World::default());
    let report = run(&mixed(options), &mut m, &world).unwrap();
    let recipe = Recipe::parse(&report.mix.unwrap().recipe().text()).unwrap();
    assert_eq!(recipe.layers.len(), 10);

    let consts = |m: &Module| -> Vec<_> {
        let ids = m.regions[m.top].consts.iter().filter_map(|&v| m.const_of(v));
        ids.map(|c| m.consts[c].read().unwrap().to_vec()).collect()
    };
    let (mut again, world) = (model(false), World::default());
    let pass = Mixed { recipe: Some(recipe.clone()), ..Mixed::default() };
    let report = run(&pass, &mut again, &world).unwrap();
    assert_eq!(world.measured.into_inner(), 0);
    assert!(consts(&m) == consts(&again) && report.mix.is_none());
    let warned = |report: &Report| {
        report.warnings.iter().filter(|w| w.contains("recipe")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(warned(&report), [""; 0]);

    // Edited: one layer is left out, one is float, one has other bits.
    let mut edited = recipe;
    edited.layers.remove(0);
    edited.layers[0].choice = Choice::Float;
    edited.layers[1].choice = Choice::parse("8/row").unwrap();
    let pass = Mixed { recipe: Some(edited.clone()), ..Mixed::default() };
    let report = run(&pass, &mut model(false), &World::default()).unwrap();
    assert_eq!(report.weights.len(), 8);
    assert_eq!((report.weights[0].weight.as_str(), report.weights[0].bits), ("w2", 8));
    let why = |node: &str| report.left.iter().find(|l| *l.node == *node).unwrap().why.clone();
    assert_eq!(
        (why("/node0").as_str(), why("/node1").as_str()),
        ("the recipe leaves it out", "the choice for it is float")
    );
    assert_eq!(warned(&report), ["the recipe leaves out 1 weight that stays float"]);

    // And wrong.
    let wrong = |change: &dyn Fn(&mut Recipe)| {
        let mut recipe = edited.clone();
        change(&mut recipe);
        let pass = Mixed { recipe: Some(recipe), ..Mixed::default() };
        run(&pass, &mut model(false), &World::default()).unwrap_err().to_string()
    };
    let error = wrong(&|r| r.layers[3].weight = "w44".into());
    assert!(
        error.contains("\"w44\"") && error.contains("the nearest is \"w4\" at node \"/node4\""),
        "{error}"
    );
    let error = wrong(&|r| r.layers[3].node = "/other".into());
    assert!(error.contains("at node \"/other\", but in the model it is at node \"/node4\""), "{error}");
    let error = wrong(&|r| r.layers[3] = r.layers[4].clone());
    assert!(error.contains("\"w5\"") && error.contains("twice"), "{error}");
    let pass = Mixed { recipe: Some(edited.clone()), budget: Some(Bits(4.0)), ..Mixed::default() };
    let error = run(&pass, &mut model(false), &World::default()).unwrap_err().to_string();
    assert!(error.contains("option budget: a recipe leaves nothing to choose"), "{error}");
}

#[test]
fn a_file_is_never_too_large() {
    let world = World::default();
    let mut last = f64::INFINITY;
    let mut sizes = 0;
    for size in (5_000..22_000).step_by(431) {
        let pass = mixed(serde_json::json!({"size": size, "choices": ["2/16", "4/16", "8/16", 16, "float"]}));
        let mut m = model(false);
        let report = match run(&pass, &mut m, &world) {
            Ok(report) => report,
            Err(PassError::Option { option: "size", why, .. }) if sizes == 0 => {
                assert!(why.contains("the smallest choices make a file of"), "{why}");
                continue;
            }
            Err(e) => panic!("{e}"),
        };
        sizes += 1;
        let mix = report.mix.unwrap();
        let file = world.file_bytes(&m).unwrap();
        assert_eq!(mix.taken.file_bytes, Some(file));
        assert!(file <= size, "{file} {size}");
        // More room is never worse.
        assert!(mix.taken.predicted <= last);
        last = mix.taken.predicted;
    }
    assert!(sizes > 10);
    // With all the room there is, nothing is lost.
    assert_eq!(last, 0.0);
}

#[test]
fn a_limit_of_perplexity_is_met_with_the_fewest_bytes() {
    let allowed = |limit: &str| {
        let pass = mixed(serde_json::json!({"ppl": limit, "choices": CHOICES}));
        run(&pass, &mut model(false), &World::default())
    };
    for (limit, growth) in [("+2%", 0.02), ("+10%", 0.1), ("+50%", 0.5)] {
        let mix = allowed(limit).unwrap().mix.unwrap();
        assert!(mix.taken.measured.unwrap().kl <= growth && mix.measured_recipes > 2);
        // Perplexity is 1 + KL here, so that the frontier says what is best, to a thousandth.
        let best = mix.frontier.points.iter().find(|p| p.predicted <= growth).unwrap().bytes;
        let taken = mix.taken.bytes;
        assert!(taken >= best && (taken - best) as f64 <= 0.001 * taken as f64, "{limit}: {taken} {best}");
    }
    // The smallest recipe does.
    let mix = allowed("+200%").unwrap().mix.unwrap();
    assert_eq!(mix.taken.bytes, mix.frontier.points[0].bytes);
    let error = allowed("+0.1%").unwrap_err().to_string();
    assert!(error.contains("option ppl: it cannot be met") && error.contains("grows by 0.74 %"), "{error}");
}

#[test]
fn tied_and_fused_weights_have_one_choice() {
    let pass = mixed(serde_json::json!({"budget": 6, "choices": CHOICES, "fused": true}));
    let report = run(&pass, &mut model(false), &World::default()).unwrap();
    let mix = report.mix.unwrap();
    assert_eq!(mix.layers.len(), 9);
    let names: Vec<&str> = mix.layers[8].weights.iter().map(|w| w.0.as_str()).collect();
    assert_eq!(names, ["w8", "w9"]);
    let bits = |w: &str| report.weights.iter().find(|r| r.weight == w).unwrap().bits;
    assert_eq!(bits("w8"), bits("w9"));
    assert_eq!(mix.recipe().layers.len(), 10);

    // The fourth product has the shape of the first and reads its weight.
    let pass = mixed(serde_json::json!({"budget": 6, "choices": CHOICES}));
    let report = run(&pass, &mut model(true), &World::default()).unwrap();
    assert_eq!((report.weights.len(), report.mix.unwrap().layers.len()), (9, 9));
}

#[test]
fn what_cannot_be_asked_for() {
    let refused = |options: serde_json::Value| {
        run(&mixed(options), &mut model(false), &World::default()).unwrap_err().to_string()
    };
    // 2 bits in groups of 16 with scales of 32 bits take more than 4 bits a weight: the figure can be asked for.
    let error = refused(serde_json::json!({"budget": 3, "choices": CHOICES}));
    let least = error.split("the smallest choices take ").nth(1).unwrap().split(' ').next().unwrap();
    assert!((4.0..4.6).contains(&least.parse::<f64>().unwrap()), "{error}");
    let pass = mixed(serde_json::json!({"budget": format!("{least}bits"), "choices": CHOICES}));
    let mix = run(&pass, &mut model(false), &World::default()).unwrap().mix.unwrap();
    assert!(mix.taken.picks.iter().all(|&p| p == 0));

    assert!(refused(serde_json::json!({})).contains("found none of them"));
    assert!(refused(serde_json::json!({"budget": 5, "ppl": "1%"})).contains("found several"));
    assert!(refused(serde_json::json!({"budget": 5, "choices": []})).contains("option choices"));
    assert!(refused(serde_json::json!({"budget": 5, "only": ["nothing"]})).contains("matched nothing"));
    for (options, why) in [
        (serde_json::json!({"budget": "5.2MB"}), "expected bits"),
        (serde_json::json!({"choices": ["4/33"]}), "multiple of 16"),
        (serde_json::json!({"solver": "dpp"}), "unknown variant"),
        (serde_json::json!({"method": "awq"}), "expected one of"),
    ] {
        let error = serde_json::from_value::<Mixed>(options).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

/// A weight named like an op type or like another's node: the choice for it reaches no other.
#[test]
fn names_that_others_have_too() {
    let mut m = model(false);
    let values: Vec<Value> = m.regions[m.top].consts.clone();
    let label = |i: usize| format!("w{i}");
    m.values[values[2]].name = "MatMul".into();
    m.values[values[5]].name = "/node7".into();
    let line = |weight: &str, node: usize, choice: &str| Line {
        weight: weight.into(),
        node: format!("/node{node}"),
        choice: Choice::parse(choice).unwrap(),
        bytes: None,
        kl: None,
    };
    let recipe = Recipe {
        layers: vec![line("MatMul", 2, "8/16"), line("/node7", 5, "2/16"), line(&label(7), 7, "4/16")],
    };
    let pass = Mixed { recipe: Some(recipe), ..Mixed::default() };
    let report = run(&pass, &mut m, &World::default()).unwrap();
    let done: Vec<(&str, u32)> = report.weights.iter().map(|w| (w.weight.as_str(), w.bits)).collect();
    assert_eq!(done, [("MatMul", 8), ("/node7", 2), ("w7", 4)]);
}
