//! Ranges against what is known of distributions, and against sorting.

use super::*;
use dialects::random::Rng;

const INT8: Form = Form { symmetric: true, levels: 255 };
const UINT8: Form = Form { symmetric: false, levels: 256 };

fn histogram(x: &[f32]) -> Histogram {
    let mut h = Histogram::default();
    x.chunks(1000).for_each(|x| h.add(x));
    h
}

/// Normal deviates (Box and Muller).
fn normal(n: usize) -> Vec<f32> {
    let mut rng = Rng(7);
    let mut uniform = || (rng.below(1 << 24) as f64 + 0.5) / f64::from(1 << 24);
    let one = |_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
    (0..n).map(one).collect()
}

fn found(h: &Histogram, method: Method, percentile: f64, form: Form) -> Range {
    range(h, method, percentile, form).unwrap()
}

#[test]
fn ranges_hold_zero() {
    let h = histogram(&[2.0, 3.0, 5.0]);
    assert_eq!(found(&h, Method::Minmax, 0.0, UINT8), Range { min: 0.0, max: 5.0 });
    assert_eq!(found(&h, Method::Minmax, 0.0, INT8), Range { min: -5.0, max: 5.0 });
    let h = histogram(&[-2.0, -8.0, 1.0]);
    assert_eq!(found(&h, Method::Minmax, 0.0, UINT8), Range { min: -8.0, max: 1.0 });
    assert_eq!(found(&h, Method::Minmax, 0.0, INT8), Range { min: -8.0, max: 8.0 });
    assert_eq!(range(&Histogram::default(), Method::Mse, 0.0, INT8), None);
}

/// The least squared error of a normal variable on uniform steps is at 3.92 deviations with 8 bits, at 2.55 with 4
/// (Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment", NeurIPS 2019,
/// table 1).
#[test]
fn squared_error_of_a_normal_variable() {
    let h = histogram(&normal(400_000));
    for (levels, expected) in [(256, 3.92), (16, 2.55)] {
        for symmetric in [true, false] {
            let r = found(&h, Method::Mse, 0.0, Form { symmetric, levels });
            assert!((f64::from(r.max) - expected).abs() < 0.15, "{levels} levels: {r:?}");
            assert!((f64::from(r.min) + expected).abs() < 0.15, "{levels} levels: {r:?}");
        }
    }
}

#[test]
fn percentiles_of_a_normal_variable() {
    let h = histogram(&normal(400_000));
    // Quantiles of the normal distribution.
    for (percentile, end) in [(95.0, 1.960), (99.0, 2.576), (99.9, 3.291)] {
        for form in [INT8, UINT8] {
            let r = found(&h, Method::Percentile, percentile, form);
            assert!((f64::from(r.max) - end).abs() < 0.05 && (f64::from(r.min) + end).abs() < 0.05, "{r:?}");
        }
    }
}

/// A few values far out are clipped; where values are spread evenly nothing is.
#[test]
fn entropy_clips_what_lies_far_out() {
    let mut x = normal(100_000);
    x.push(60.0);
    x.push(-50.0);
    let r = found(&histogram(&x), Method::Entropy, 0.0, INT8);
    assert!(r.max < 12.0 && r.max > 2.0 && r.min == -r.max, "{r:?}");
    let even: Vec<f32> = (0..100_000).map(|i| i as f32 / 50_000.0 - 1.0).collect();
    let r = found(&histogram(&even), Method::Entropy, 0.0, INT8);
    assert!(r.max > 0.95, "{r:?}");
    // Of one sign: all codes serve it.
    let positive: Vec<f32> = normal(100_000).iter().map(|x| x.max(0.0)).collect();
    let r = found(&histogram(&positive), Method::Entropy, 0.0, UINT8);
    assert!(r.min == 0.0 && r.max > 2.0, "{r:?}");
}

/// By hand: one hundredth of the way from the first batch's ends to the second's.
#[test]
fn moving_averages() {
    let mut h = Histogram::default();
    h.add(&[-1.0, 1.0]);
    h.add(&[-2.0, 11.0]);
    let r = found(&h, Method::Moving, 0.0, UINT8);
    assert!((r.max - 1.1).abs() < 1e-6 && (r.min + 1.01).abs() < 1e-6, "{r:?}");
}

/// What is saved reads back as it was; what no values can have is refused.
#[test]
fn statistics_are_saved() {
    let mut x = normal(5000);
    x.extend([0.0, 1e-30, -70.0]);
    let tensors = [("x".to_string(), histogram(&x)), ("zero".into(), histogram(&[0.0; 3]))].into();
    let of_channels =
        Channels { axis: 1, min: vec![-1.5, 0.0], max: vec![0.0, 2.0], magnitude: vec![0.25, 1.0] };
    let channels = [("x".to_string(), of_channels)].into();
    let kept = Statistics { model: "ab".into(), method: Method::Mse, percentile: 99.9, tensors, channels };
    let text = kept.text().unwrap();
    assert_eq!(Statistics::parse(&text).unwrap(), kept);
    let spoiled = [
        ("\"min\":-70.0", "\"min\":null", "expected f32"),
        ("\"min\":-70.0", "\"min\":1e39", "finite"),
        ("\"min\":-70.0", "\"min\":70.0", "finite range, found 70"),
        ("\"zeros\":3", "\"zeros\":0", "\"zero\": 0 values"),
        ("\"counts\":[[", "\"counts\":[[4096,1],[", "a bin at 4096"),
        ("\"exponent\":7", "\"exponent\":2000", "2^2000"),
        ("\"zeros\":3", "\"zeros\":-1", "invalid value"),
        ("[-1.5,0.0]", "[-1.5,0.5]", "channel 1: expected a finite range with zero in it"),
        ("[-1.5,0.0]", "[-1e39,0.0]", "finite range"),
        ("[-1.5,0.0]", "[-1.5]", "1 least values of channels, 2 greatest"),
        ("[0.25,1.0]", "[0.25,-1.0]", "channel 1"),
    ];
    for (old, new, expected) in spoiled {
        assert!(text.contains(old), "{old} in {text}");
        let why = Statistics::parse(&text.replace(old, new)).unwrap_err();
        assert!(why.contains(expected), "{expected}: {why}");
    }
}
