//! Packed products, against sums in float64 over the same codes.

use crate::harness::{Loaded, load, targets};
use codegen::Target;
use codegen::kernels::packed::{Form, Parts, prepare, product};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

struct Case {
    form: Form,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
    x: Vec<f32>,
    m: usize,
}

fn bytes<T>(v: &mut [T]) -> *mut u8 {
    v.as_mut_ptr().cast()
}

impl Case {
    fn random(form: Form, m: usize, rng: &mut impl Rng) -> Case {
        let cells = form.n * form.groups();
        let scale = |r: f32| if form.half_scales { half::f16::from_f32(r).to_f32() } else { r };
        Case {
            form,
            codes: (0..cells * form.group * form.bits / 8).map(|_| rng.random()).collect(),
            scales: (0..cells).map(|_| scale(rng.random_range(0.001f32..0.1))).collect(),
            zeros: (0..cells).map(|_| rng.random_range(0..1u32 << form.bits) as u8).collect(),
            x: (0..m * form.k).map(|_| rng.random_range(-3f32..3.0)).collect(),
            m,
        }
    }

    fn run(&self, loaded: &Loaded) -> Vec<f32> {
        let form = &self.form;
        let parts =
            Parts { codes: &self.codes, scales: &self.scales, zeros: form.zeros.then_some(&self.zeros[..]) };
        let mut w = form.pack(&parts);
        let mut x = self.x.clone();
        let mut prepared = vec![0u8; self.m * form.x_row()];
        let mut y = vec![f32::NAN; self.m * form.n + 1];
        loaded.call(0, &[bytes(&mut x), bytes(&mut prepared)], &[], self.m);
        loaded.call(
            1,
            &[bytes(&mut prepared), bytes(&mut w), bytes(&mut y)],
            &[self.m as i64],
            form.blocks(),
        );
        assert!(y.pop().unwrap().is_nan(), "written past the end");
        y
    }

    /// The same sums in float64, of activations as the form rounds them.
    fn expected(&self) -> Vec<f64> {
        let form = &self.form;
        let mut out = Vec::new();
        for row in self.x.chunks(form.k.max(1)).take(self.m) {
            let row: Vec<f64> = match form.int8 {
                false => row.iter().map(|&v| f64::from(v)).collect(),
                true => row
                    .chunks(form.group)
                    .flat_map(|g| {
                        let top = g.iter().fold(0f32, |a, v| a.max(v.abs()));
                        let (scale, inverse) = (top / 127.0, if top == 0.0 { 0.0 } else { 127.0 / top });
                        g.iter().map(move |v| f64::from((v * inverse).round_ties_even()) * f64::from(scale))
                    })
                    .collect(),
            };
            for n in 0..form.n {
                let sum = (0..form.k).map(|k| {
                    let cell = n * form.groups() + k / form.group;
                    let inside = k % form.group;
                    let byte = self.codes[cell * form.group * form.bits / 8 + inside * form.bits / 8];
                    let code = u32::from(byte) >> (inside * form.bits % 8) & ((1 << form.bits) - 1);
                    let zero = if form.zeros {
                        f64::from(self.zeros[cell])
                    } else {
                        f64::from(1u32 << (form.bits - 1))
                    };
                    (f64::from(code) - zero) * f64::from(self.scales[cell]) * row[k]
                });
                out.push(sum.sum());
            }
        }
        out
    }
}

#[test]
fn products_of_packed_weights() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for target in targets() {
        for bits in [2, 4, 8] {
            for (group, zeros, half_scales, int8) in [
                (32, true, false, true),
                (32, false, true, true),
                (16, true, true, true),
                (128, true, false, true),
                (32, true, false, false),
                (64, false, true, false),
                (16, false, false, false),
            ] {
                for (m, n, k) in [(1, 16, 128), (1, 37, 96), (5, 48, 200), (9, 3, 40), (0, 16, 32), (4, 1, 1)]
                {
                    let form = Form { n, k, group, bits, zeros, half_scales, int8 };
                    check(&target, form, m, &mut rng);
                }
            }
        }
    }
}

fn check(target: &Target, form: Form, m: usize, rng: &mut impl Rng) {
    let case = Case::random(form, m, rng);
    let loaded = load(target, &[&prepare(target, &form), &product(target, &form, &|_, _, _, _, out| out)]);
    let (found, expected) = (case.run(&loaded), case.expected());
    let top = expected.iter().fold(1e-6f64, |a, v| a.max(v.abs()));
    for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
        let off = (f64::from(*f) - e).abs() / top;
        assert!(off < 2e-6, "{target} {form:?} m={m}: element {i} is {f}, expected {e}");
    }
    let one = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    assert_eq!(
        one.install(|| case.run(&loaded)),
        found,
        "{target} {form:?}: another result on three threads"
    );
}
