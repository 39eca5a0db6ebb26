//! `--resume`, from outside: runs that are killed at random moments and started again, with other numbers of threads,
//! and folders that are damaged or belong to another run.

#[path = "common/program.rs"]
mod program;

use program::{Folder, MODEL, ok, qcc};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// Tokens that calibrate; few, since debug builds run this too.
const DATA: &[&str] = &["--calib", "calib_ids.npy", "--calib-samples", "4", "--seq-len", "32"];

const PASSES: &[&str] = &["--pass", "awq{grid=6},pack-int4"];

fn start(args: &[&str]) -> Child {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models");
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcc"));
    command.args(args).current_dir(models).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn entries(folder: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let is_entry = |p: &PathBuf| p.file_name().unwrap().len() == 64;
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).filter(is_entry).collect();
    paths.sort();
    paths
}

/// The note of a run with `--resume`.
fn note(args: &[&str]) -> String {
    let json: serde_json::Value = serde_json::from_str(&ok(&[args, &["--json"]].concat())).unwrap();
    let notes = json["notes"].as_array().unwrap().iter().map(|n| n.as_str().unwrap());
    notes.filter(|n| n.contains("taken from it")).collect::<Vec<_>>().join("")
}

/// Kills 20 runs at moments between their start and their end; after each series that ends, the output is that of a
/// run that nothing stopped.
#[test]
fn killed_runs_end_as_one_that_was_not() {
    const KILLS: usize = 20;
    let dir = Folder::new();
    let (plain, out, kept) = (dir.path("plain.onnx"), dir.path("out.onnx"), dir.path("kept"));
    let started = Instant::now();
    ok(&[&[MODEL, "-o", &plain], PASSES, DATA].concat());
    let whole = started.elapsed();
    let expected = fs::read(&plain).unwrap();

    let mut random = ChaCha8Rng::seed_from_u64(4);
    let (mut kills, mut series, mut carried) = (0, 0, Vec::new());
    while kills < KILLS {
        let _ = fs::remove_dir_all(&kept);
        let _ = fs::remove_file(&out);
        series += 1;
        loop {
            let threads = random.random_range(1..4u32).to_string();
            let flags = ["-o", out.as_str(), "--resume", &kept, "--threads", &threads];
            let mut child = start(&[&[MODEL], &flags[..], PASSES, DATA].concat());
            if kills < KILLS {
                std::thread::sleep(whole.mul_f64(random.random_range(0.1..0.8)));
            }
            let ended = if kills < KILLS { child.try_wait().unwrap() } else { Some(child.wait().unwrap()) };
            if let Some(status) = ended {
                assert!(status.success());
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            carried.push(entries(&kept).len());
        }
        assert!(fs::read(&out).unwrap() == expected, "series {series} of runs ended otherwise");
    }
    println!("{kills} kills in {series} series; finished groups at each: {carried:?}");
    assert!(carried.iter().any(|&n| n > 0), "no run was killed that had finished something");

    // All is there now: nothing is left to do, and nothing of the data is looked at again.
    let n = entries(&kept).len();
    let note = note(&[&[MODEL, "-o", &out, "--resume", &kept, "--threads", "3"], PASSES, DATA].concat());
    assert!(note.ends_with(&format!("{n} finished results taken from it, 0 kept in it")), "{note}");
    assert!(fs::read(&out).unwrap() == expected);
}

/// Whatever part of the work is finished, a run ends as one that finished nothing before.
#[test]
fn any_part_of_the_work_may_be_finished() {
    let dir = Folder::new();
    let (plain, out, kept) = (dir.path("plain.onnx"), dir.path("out.onnx"), dir.path("kept"));
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let sequential = ["layer", "block", "off"].map(|s| format!("gptq{{sequential={s}}}"));
    let alone = sequential.iter().map(String::as_str).chain(["awq{grid=6}"]);
    let smooth = "smooth-migrate{alpha=auto},rtn{bits=8, group=-1, symmetric=true}";
    for passes in alone.chain(["awq{grid=6},gptq{sequential=off}", smooth]) {
        let data = ["--calib", "calib_ids.npy", "--calib-samples", "2", "--seq-len", "24"];
        // Not all layers: this runs in debug builds too.
        let only = ["--only", "*linear_1*"];
        let pipeline = format!("{passes},pack-int4");
        let args = [&[MODEL, "--pass", &pipeline], &data[..], &only].concat();
        ok(&[&args[..], &["-o", &plain]].concat());
        let args = [&args[..], &["-o", &out, "--resume", &kept]].concat();
        ok(&args);
        let all = entries(&kept);
        assert!(all.len() >= 5, "{passes}: {}", all.len());
        for share in [0.2, 0.5, 0.9] {
            let gone: Vec<&PathBuf> = all.iter().filter(|_| random.random_bool(share)).collect();
            gone.iter().for_each(|path| fs::remove_file(path).unwrap());
            let (taken, made) = (all.len() - gone.len(), gone.len());
            let said = note(&args);
            let results = if taken == 1 { "result" } else { "results" };
            assert!(
                said.ends_with(&format!(": {taken} finished {results} taken from it, {made} kept in it")),
                "{said}"
            );
            assert!(
                fs::read(&out).unwrap() == fs::read(&plain).unwrap(),
                "{passes} without {share} of its results"
            );
        }
        fs::remove_dir_all(&kept).unwrap();
    }
}

/// Entries that are cut, changed, empty or gone are made anew, and said.
#[test]
fn damaged_entries_are_made_anew() {
    let dir = Folder::new();
    let (plain, out, kept) = (dir.path("plain.onnx"), dir.path("out.onnx"), dir.path("kept"));
    let passes = ["--pass", "rtn{group=64},pack-qdq"];
    ok(&[&[MODEL, "-o", &plain], &passes[..]].concat());
    let args = [&[MODEL, "-o", &out, "--resume", &kept], &passes[..]].concat();
    assert!(note(&args).ends_with("0 finished results taken from it, 29 kept in it"));
    let damage: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| bytes.clear(),
        |bytes| *bytes.last_mut().unwrap() ^= 1,
        |bytes| bytes.push(0),
    ];
    let paths = entries(&kept);
    for (path, damage) in paths.iter().zip(damage) {
        let mut bytes = fs::read(path).unwrap();
        damage(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
    // Of another weight, under the name of this one.
    fs::copy(&paths[10], &paths[9]).unwrap();
    fs::remove_file(&paths[20]).unwrap();
    let said = note(&args);
    assert!(
        said.ends_with("23 finished results taken from it, 6 kept in it; 5 damaged results made anew"),
        "{said}"
    );
    assert!(fs::read(&out).unwrap() == fs::read(&plain).unwrap());
    assert!(note(&args).ends_with("29 finished results taken from it, 0 kept in it"));
}

/// Another model, other data, other options: refused, with what differs, and nothing is touched.
#[test]
fn a_folder_of_another_run_is_refused() {
    let dir = Folder::new();
    let (out, kept, other) = (dir.path("out.onnx"), dir.path("kept"), dir.path("other.onnx"));
    let args = |model: &str, pipeline: &str, more: &[&str]| {
        let args = [model, "--pass", pipeline, "-o", &out, "--resume", &kept];
        args.iter().chain(more).map(|s| s.to_string()).collect::<Vec<_>>()
    };
    let run = |args: Vec<String>| qcc(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(run(args(MODEL, "rtn,pack-int4", &[])).code, 0);
    let before = entries(&kept);
    fs::remove_file(&out).unwrap();
    // One bit of a weight.
    let mut bytes =
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models").join(MODEL)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&other, bytes).unwrap();
    let noise = ["--calib", "random", "--calib-samples", "1", "--seq-len", "8"];
    for (args, fields) in [
        (args(&other, "rtn,pack-int4", &[]), &["model"][..]),
        (args(MODEL, "rtn{bits=8},pack-int4", &[]), &["pipeline"]),
        (args(MODEL, "rtn,pack-int4", &["--skip", "*lm_head*"]), &["pipeline"]),
        (args(MODEL, "rtn,pack-int4", &["--tied", "shared"]), &["flags"]),
        (args(MODEL, "awq,pack-int4", &noise), &["calibration", "pipeline"]),
    ] {
        let ran = run(args);
        assert_eq!(ran.code, 1, "{fields:?}");
        assert!(ran.stderr.contains("belongs to another run"), "{}", ran.stderr);
        let named = ["qcc", "format", "model", "calibration", "pipeline", "flags"];
        let named: Vec<&str> =
            named.into_iter().filter(|f| ran.stderr.contains(&format!(" {f}: expected"))).collect();
        assert_eq!(named, fields, "{}", ran.stderr);
        assert!(!Path::new(&out).exists() && entries(&kept) == before);
    }
    // What does not change what passes do may differ.
    let flags = ["--external-data", "--check", "--threads", "1"];
    let ran = run(args(MODEL, "rtn,pack-int4", &flags));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("29 finished results taken from it, 0 kept in it"), "{}", ran.stdout);
    // A file in the folder's place, and a folder of other things.
    for (place, what) in
        [(out.as_str(), "make the folder"), (dir.0.path().to_str().unwrap(), "an empty folder")]
    {
        let ran = qcc(&[MODEL, "--pass", "rtn,pack-int4", "--dry-run", "--resume", place]);
        assert_eq!(ran.code, 1);
        assert!(ran.stderr.contains(what), "{}", ran.stderr);
    }
}
