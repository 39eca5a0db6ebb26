//! Mixed precision from outside: the built program on the small language model.

#[path = "common/program.rs"]
mod program;

use program::{Folder, MODEL, ok, qcc};
use serde_json::Value as Json;
use std::fs;

/// Few choices and rows, so that a run takes seconds.
const DATA: [&str; 6] = ["--calib", "calib_ids.npy", "--calib-samples", "2", "--seq-len", "32"];

fn run<'a>(pass: &'a str, rest: &[&'a str]) -> Vec<&'a str> {
    [&[MODEL, "--pass", pass], &DATA[..], rest].concat()
}

fn read(path: &str) -> Json {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

const BITS: &str = "mixed{budget=5bits, choices=[2/32, 4/32, 8/32], measure=gram},pack-int4";

#[test]
fn a_search_is_written_down_and_replayed() {
    let dir = Folder::new();
    let (out, json, svg) = (dir.path("q.onnx"), dir.path("f.json"), dir.path("f.svg"));
    let (recipe, again) = (dir.path("recipe.json"), dir.path("again.onnx"));
    let files = ["-o", &out, "--frontier", &json, "--frontier", &svg, "--write-recipe", &recipe, "--json"];
    let report: Json = serde_json::from_str(&ok(&run(BITS, &files))).unwrap();

    let mix = read(&json);
    assert_eq!((mix["asked"].as_str(), mix["exact"].as_bool()), (Some("budget=5bits"), Some(true)));
    // The layers, by `inspect`: 4 times 7, and the head.
    assert_eq!(mix["layers"].as_array().unwrap().len(), 29);
    let bits = mix["taken"]["bits"].as_f64().unwrap();
    assert!(bits <= 5.0 && bits > 4.9, "{bits}");
    assert!((report["totals"]["bits_per_weight"].as_f64().unwrap() - bits).abs() < 1e-9);
    let points = mix["frontier"]["points"].as_array().unwrap();
    let of = |p: &Json| (p["bytes"].as_u64().unwrap(), p["predicted"].as_f64().unwrap());
    assert!(points.is_sorted_by(|a, b| of(a).0 < of(b).0 && of(a).1 > of(b).1));
    // The shares of a model with one choice add up to what was measured of it.
    for u in mix["uniform"].as_array().unwrap() {
        let (predicted, measured) = (u["predicted"].as_f64().unwrap(), u["measured"].as_f64().unwrap());
        assert!((predicted / measured - 1.0).abs() < 1e-9, "{u}");
    }
    let chart = fs::read_to_string(&svg).unwrap();
    assert!(chart.starts_with("<svg ") && chart.trim_end().ends_with("</svg>"));
    for text in ["bits for each weight", "4/32/rtn", "frontier, predicted"] {
        assert!(chart.contains(text), "{text}");
    }

    // A line for each layer, which gives the same model again, without data.
    let text = fs::read_to_string(&recipe).unwrap();
    assert_eq!(text.lines().filter(|l| l.contains("\"choice\":")).count(), 29);
    let replay = [MODEL, "--pass", "mixed,pack-int4", "--recipe", &recipe];
    ok(&[&replay[..], &["-o", &again]].concat());
    let codes = |path: &str| {
        let text = ok(&[path, "--emit", "qir"]);
        text.lines().filter(|l| l.contains("const %")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(codes(&out), codes(&again));

    // Edited: a layer is left out, which is said.
    let lines: Vec<&str> = text.lines().collect();
    fs::write(&recipe, [&lines[..3], &lines[4..]].concat().join("\n")).unwrap();
    let said = ok(&[&replay[..], &["--dry-run"]].concat());
    assert!(said.contains("warning: the recipe leaves out 1 weight that stays float"), "{said}");
    assert!(said.contains("the recipe leaves it out") && said.contains("28 weights quantized"), "{said}");
    // A layer that there is not.
    fs::write(&recipe, text.replace("\"m.lm_head.weight\"", "\"m.lm_haed.weight\"")).unwrap();
    let ran = qcc(&[&replay[..], &["--dry-run"]].concat());
    assert_eq!(ran.code, 1);
    let said = ran.stderr.split_whitespace().filter(|w| *w != "│").collect::<Vec<_>>().join(" ");
    assert!(
        said.contains("\"m.lm_haed.weight\": the recipe names a layer that the model does not have"),
        "{said}"
    );
    assert!(said.contains("the nearest is \"m.lm_head.weight\""), "{said}");
    // A method that there is not, by its line.
    fs::write(&recipe, text.replacen("/rtn", "/gtpq", 1)).unwrap();
    let ran = qcc(&[&replay[..], &["--dry-run"]].concat());
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("is no recipe") && ran.stderr.contains("line 2"), "{}", ran.stderr);
}

#[test]
fn a_file_is_no_larger_than_asked_for() {
    let dir = Folder::new();
    for (i, (size, bytes, flags)) in [
        ("3500KB", 3_500_000, &["--scale-type", "f16"][..]),
        ("3.4MB", 3_400_000, &[]),
        ("1.4MB", 1_400_000, &["--tied", "shared"]),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path(&format!("{i}.onnx"));
        let pass =
            format!("mixed{{size={size}, choices=[2/32, 4/32, 4/128, 8/32, 16], measure=gram}},pack-int4");
        let report = ok(&run(&pass, &[flags, &["-o", &out, "--json"]].concat()));
        let file = fs::metadata(&out).unwrap().len();
        // What the search says is what is written, and little room is left: a step of the smallest weight.
        assert!(
            report.contains(&format!("a file of {:.2} MB ({file} bytes)", file as f64 / 1e6)),
            "{report}"
        );
        assert!(file <= bytes && file > bytes - 10_000, "{size}: {file}");
    }
}

#[test]
fn what_cannot_be_done() {
    let dir = Folder::new();
    let out = dir.path("q.onnx");
    let cases: &[(&str, &[&str], &str)] = &[
        (
            "mixed{budget=1.5bits, choices=[2/32, 4/32], measure=gram},pack-int4",
            &[],
            "the smallest choices take 3.",
        ),
        (
            "mixed{size=1MB, choices=[2/32, 4/32], measure=gram},pack-int4",
            &[],
            "the smallest choices make a file of",
        ),
        ("mixed{ppl=+0%, choices=2/32, measure=gram},pack-int4", &[], "it cannot be met"),
        ("mixed,pack-int4", &[], "expected budget=5.2bits, size=35MB or ppl=+1%"),
        ("mixed{budget=5.2MB},pack-int4", &[], "expected bits for each weight"),
        ("mixed{budget=5bits, choices=[4/33]},pack-int4", &[], "multiple of 16"),
        ("rtn,pack-int4", &["--write-recipe", &out], "--write-recipe is about mixed"),
        ("mixed{budget=5bits},pack-int4", &["--frontier", "frontier.png"], "name it .json or .svg"),
    ];
    for (pass, flags, why) in cases {
        let ran = qcc(&run(pass, &[&["-o", &out], *flags].concat()));
        let said = ran.stderr.split_whitespace().filter(|w| *w != "│").collect::<Vec<_>>().join(" ");
        assert!(ran.code == 2 && said.contains(why), "{pass}\n{}", ran.stderr);
    }
    assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0);
}

#[test]
fn perplexity_stays_within() {
    let dir = Folder::new();
    let (out, json) = (dir.path("q.onnx"), dir.path("f.json"));
    let pass = "mixed{ppl=+3%, choices=[2/32, 4/32, 8/32], measure=gram},pack-int4";
    ok(&run(pass, &["-o", &out, "--frontier", &json, "--quiet"]));
    let mix = read(&json);
    let measured = &mix["taken"]["measured"];
    let (after, before) = (&measured["perplexity"], &measured["baseline_perplexity"]);
    let growth = after.as_f64().unwrap() / before.as_f64().unwrap() - 1.0;
    assert!(growth <= 0.03, "{growth}");
    assert!(mix["measured_recipes"].as_u64().unwrap() > 2);
}

#[test]
fn a_weight_of_f16_is_no_weight_that_stays_float() {
    let report = ok(&[MODEL, "--pass", "f16-weights", "--dry-run", "--json"]);
    let report: Json = serde_json::from_str(&report).unwrap();
    assert_eq!(report["weights"].as_array().unwrap().len(), 29);
    assert_eq!(report["totals"]["bits_per_weight"], 16.0);
    // The embedding.
    let float = report["float"].as_array().unwrap();
    assert_eq!(float.len(), 1);
    assert_eq!(float[0]["op"], "onnx.Gather");
}
