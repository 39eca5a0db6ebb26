//! Every exact pass on random modules: the same function before and after, as the interpreter computes it.

use dialects::exec::run_once;
use dialects::ir::interp::Interpreter;
use dialects::ir::print::{Style, print};
use dialects::ir::{Elem, Module, infer, verify};
use dialects::ops::Item;
use dialects::random::{Rng, float_module};
use dialects::tensor::Tensor;
use passes::{Exactness, Settings};
use qcc::driver::{self, Options};
use qcc::env::DriverEnv;
use qcc::pipeline::Pipeline;
use qcc::term::Term;

const ALL: Style = Style { full: true, max_inline: u64::MAX };

fn run(m: &Module, seed: u64) -> Vec<Tensor> {
    let mut rng = Rng(seed);
    let input = |rng: &mut Rng| Tensor::from_f32(Elem::F32, &[2, 3, 8], rng.floats(48)).unwrap();
    let inputs: Vec<_> = m.regions[m.top].args.iter().map(|&v| (v, Item::from(input(&mut rng)))).collect();
    let exec = Interpreter::new(qcc::registry().ops().clone());
    let out = run_once(&exec, m, &inputs, &m.regions[m.top].results).unwrap();
    out.iter().map(|item| item.tensor().unwrap().clone()).collect()
}

/// The largest difference of two runs, relative to the largest element of the first.
fn difference(a: &[Tensor], b: &[Tensor]) -> f32 {
    assert_eq!(a.len(), b.len());
    let one = |(a, b): (&Tensor, &Tensor)| {
        assert_eq!(a.shape(), b.shape());
        let (a, b) = (a.f32s().unwrap(), b.f32s().unwrap());
        let size = a.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        a.iter()
            .zip(b)
            .map(|(x, y)| (x - y).abs() / size)
            .fold(0.0f32, |m, d| if d > m || d.is_nan() { d } else { m })
    };
    a.iter().zip(b).map(one).fold(0.0, f32::max)
}

fn sound(m: &Module, what: &str) {
    let found: Vec<String> =
        verify::verify(m, qcc::registry().ops()).iter().map(ToString::to_string).collect();
    assert!(found.is_empty(), "{what}: {found:?}\n{}", print(m, ALL));
}

#[test]
fn random_modules_are_sound_and_run() {
    let mut ops = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let mut m = float_module(seed);
        let declared: Vec<_> = m.values.values().map(|v| v.ty.clone()).collect();
        sound(&m, &format!("seed {seed}"));
        assert!(infer::infer(&mut m, qcc::registry().ops()).is_empty());
        // Inference knows every op of these modules: without the types that they declare it finds the same.
        let mut bare = m.clone();
        for op in bare.live_ops() {
            for v in bare.ops[op].results.clone().into_iter().flatten() {
                bare.values[v].ty = Default::default();
            }
            ops.insert(bare.ops[op].name.to_string());
        }
        infer::infer(&mut bare, qcc::registry().ops());
        let found: Vec<_> = bare.values.values().map(|v| v.ty.clone()).collect();
        assert_eq!(found, declared, "seed {seed}");
        for t in run(&m, seed) {
            assert!(t.f32s().unwrap().iter().all(|x| x.abs() < 1e4), "seed {seed}: values run away");
        }
    }
    assert!(ops.len() >= 17, "{ops:?}");
}

#[test]
fn exact_passes_keep_the_function() {
    let registry = qcc::registry();
    let exact: Vec<&str> = registry
        .passes()
        .iter()
        .filter(|def| {
            let pipeline = Pipeline::parse(def.name, &registry, &[], &[]).unwrap();
            let pass = &pipeline.steps[0].pass;
            pass.exactness() == Exactness::Exact && !pass.needs_calibration()
        })
        .map(|def| def.name)
        .collect();
    assert!(exact.contains(&"const-fold") && exact.contains(&"dce"), "{exact:?}");
    let env = DriverEnv::without_data(registry.ops(), Term::new(true));
    let settings = Settings { allow_noop: true, ..Settings::default() };
    let options = Options { settings, ..Options::default() };
    let mut changed = std::collections::BTreeMap::new();
    for seed in 0..100 {
        let mut before = float_module(seed);
        infer::infer(&mut before, registry.ops());
        let expected = run(&before, seed);
        for name in &exact {
            // As many channels as the narrowest of these modules has.
            let text = if *name == "inject-outliers" { "inject-outliers{channels=1}" } else { name };
            let pipeline = Pipeline::parse(text, &registry, &[], &[]).unwrap();
            let mut after = before.clone();
            let outcome = driver::run(&mut after, &pipeline, &registry, &env, &options);
            let outcome = outcome.unwrap_or_else(|e| panic!("seed {seed}: {e}\n{}", print(&before, ALL)));
            *changed.entry(name).or_insert(0) += usize::from(outcome.passes[0].changed);
            let off = difference(&expected, &run(&after, seed));
            assert!(
                off < 1e-4,
                "seed {seed}: {name} changes the result by {off:e}\n{}\n{}",
                print(&before, ALL),
                print(&after, ALL)
            );
            let text = print(&after, ALL);
            let back = dialects::ir::parse::parse(&text).unwrap().module;
            assert_eq!(print(&back, ALL), text);
        }
    }
    for name in ["const-fold", "dce"] {
        assert!(changed[&name] > 20, "{name} had nothing to do: the test has lost its point: {changed:?}");
    }
}
