//! Packed products, against sums in float64 over the same codes.

use crate::harness::{Loaded, emulated, load, targets};
use codegen::Target;
use codegen::kernels::packed::{Form, Parts, prepare};
use codegen::kernels::packed_product::{product, units};
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

    fn run(&self, target: &Target, loaded: &Loaded, first: usize) -> Vec<f32> {
        let form = &self.form;
        let parts =
            Parts { codes: &self.codes, scales: &self.scales, zeros: form.zeros.then_some(&self.zeros[..]) };
        let mut w = form.pack(&parts);
        let mut x = self.x.clone();
        let room = self.m * form.x_row();
        let mut prepared = vec![0xa5u8; room + 256];
        let mut y = vec![f32::NAN; self.m * form.n + 64];
        loaded.call(first, &[bytes(&mut x), bytes(&mut prepared)], &[self.m as i64], self.m);
        loaded.call(
            first + 1,
            &[bytes(&mut prepared), bytes(&mut w), bytes(&mut y)],
            &[self.m as i64],
            units(target, form, self.m.into()).eval(&|_| None).unwrap() as usize,
        );
        assert!(prepared[room..].iter().all(|&b| b == 0xa5), "{form:?} m={}: rows past the end", self.m);
        let end = y.split_off(self.m * form.n);
        let past = end.iter().position(|v| !v.is_nan());
        assert_eq!(past, None, "{form:?} m={}: written past the end", self.m);
        y
    }

    /// The same sums in float64, of activations as the form rounds them; and the size of what was added, zero points apart.
    fn expected(&self) -> Vec<(f64, f64)> {
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
                    let x = f64::from(self.scales[cell]) * row[k];
                    ((f64::from(code) - zero) * x, (f64::from(code) + zero) * x.abs())
                });
                out.push(sum.fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1)));
            }
        }
        out
    }
}

#[test]
fn products_of_packed_weights() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let shapes = [
        (1, 16, 128),
        (1, 37, 96),
        (5, 48, 200),
        (13, 3, 40),
        (0, 16, 32),
        (7, 1, 1),
        (51, 70, 300),
        (100, 33, 600),
    ];
    for target in targets().into_iter().chain(emulated(&["avx512-vnni", "sapphire-rapids", "aarch64-i8mm"])) {
        let mut cases = Vec::new();
        for bits in [2, 4, 8] {
            for (i, (group, zeros, half_scales, int8)) in [
                (32, true, false, true),
                (32, false, true, true),
                (16, true, true, true),
                (128, true, false, true),
                (32, true, false, false),
                (64, false, true, false),
                (16, false, false, false),
            ]
            .into_iter()
            .enumerate()
            {
                for j in 0..if target.is_emulated() { 1 } else { 2 } {
                    let (m, n, k) = shapes[(bits + i + 3 * j) % shapes.len()];
                    let form = Form { n, k, group, bits, zeros, half_scales, int8 };
                    cases.push(Case::random(form, m, &mut rng));
                }
            }
        }
        let one = |c: &Case| {
            [prepare(&target, &c.form), product(&target, &c.form, 1, &|_, _, _, _, _, out| vec![out])]
        };
        let kernels: Vec<_> = cases.iter().flat_map(one).collect();
        let loaded = load(&target, &kernels.iter().collect::<Vec<_>>());
        cases.iter().enumerate().for_each(|(i, case)| case.check(&target, &loaded, 2 * i));
    }
}

impl Case {
    fn check(&self, target: &Target, loaded: &Loaded, first: usize) {
        let (form, m) = (&self.form, self.m);
        let (found, expected) = (self.run(target, loaded, first), self.expected());
        for (i, (f, (e, size))) in found.iter().zip(&expected).enumerate() {
            let off = (f64::from(*f) - e).abs();
            assert!(off <= 1e-6 * size, "{target} {form:?} m={m}: element {i} is {f}, expected {e}");
        }
        let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let again = three.install(|| self.run(target, loaded, first));
        assert_eq!(again, found, "{target} {form:?}: another result on three threads");
        if form.int8 && m > 0 {
            let (first_row, rest) = self.x.split_at(form.k);
            let alone = Case {
                m: 1,
                x: first_row.to_vec(),
                codes: self.codes.clone(),
                scales: self.scales.clone(),
                zeros: self.zeros.clone(),
                form: *form,
            };
            let alone = alone.run(target, loaded, first);
            assert_eq!(
                alone,
                found[..form.n],
                "{target} {form:?}: another result beside {} numbers",
                rest.len()
            );
        }
    }
}

/// What is no number, or beyond all, is not hidden by the fixed-point numbers that floats are turned to; what is small counts.
#[test]
fn floats_that_are_not_ordinary() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let form = Form { n: 20, k: 64, group: 32, bits: 4, zeros: false, half_scales: false, int8: false };
    for target in targets() {
        let mut case = Case::random(form, 9, &mut rng);
        let kernels = [prepare(&target, &form), product(&target, &form, 1, &|_, _, _, _, _, out| vec![out])];
        let loaded = load(&target, &kernels.iter().collect::<Vec<_>>());
        // Rows of a tile, and rows alone.
        for row in [1, 8] {
            for size in [0.0, 1e-30, 1e30] {
                case.x[row * 64..][..64].iter_mut().for_each(|x| *x = size * rng.random_range(-1f32..1.0));
                case.check(&target, &loaded, 0);
            }
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                case.x[row * 64 + 40] = wrong;
                let y = case.run(&target, &loaded, 0);
                let finite = |m: usize| y[m * 20..][..20].iter().filter(|v| v.is_finite()).count();
                assert_eq!((finite(row), finite(0)), (0, 20), "{target} row {row}: {wrong}");
            }
            case.x[row * 64..][..64].fill(0.5);
        }
    }
}
