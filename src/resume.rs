//! `--resume DIR`: a folder of finished work, one file for each result, and of which run it is.
//!
//! `manifest.json` says what the folder belongs to: the model by the hash of all that it is, the data by the hash of all
//! that is fed, the pipeline with every option, the flags that change what passes do, the version of qcc. A folder of
//! another run is refused. An entry is a file named by its key in hex:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `qcc-kept` |
//! | 8..12 | the version of this format, little-endian, as the length is |
//! | 12..20 | the length of the content |
//! | 20..52 | BLAKE3, keyed by the manifest's, of key and content |
//! | 52.. | the content |
//!
//! Entries appear whole or not at all, so a run may be killed at any time. One that was damaged later, or that belongs
//! to another folder or key, is found out by its hash, and counts as absent. One process at a time has the folder: it
//! holds a lock on the file `lock`, which the system drops with the process.

use crate::files::{self, FileError, OutputFile};
use crate::report::paint::count;
use dialects::ir::literal::to_hex;
use passes::store::Key;
use passes::{PassError, Store};
use serde_json::{Map, Value as Json};
use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use thiserror::Error;

const MAGIC: &[u8; 8] = b"qcc-kept";

/// The version of entries and manifest.
const FORMAT: u32 = 1;

/// Bytes before the content.
const HEADER: usize = 52;

const MANIFEST: &str = "manifest.json";
const LOCK: &str = "lock";

/// Why a folder cannot be used.
#[derive(Debug, Error)]
pub enum ResumeError {
    /// It belongs to another model, other data, other options.
    #[error("--resume: {} belongs to another run:{}", dir.display(), Lines(differences))]
    Foreign {
        /// The folder.
        dir: PathBuf,
        /// Each thing that differs.
        differences: Vec<Difference>,
    },
    /// Another process works with it.
    #[error("--resume: another process works with {}", .0.display())]
    Busy(PathBuf),
    /// It holds other things.
    #[error("--resume: {}: expected an empty folder, or one of an earlier run, found {found:?}", dir.display())]
    NotOurs {
        /// The folder.
        dir: PathBuf,
        /// What is in there.
        found: String,
    },
    /// Its manifest cannot be read.
    #[error("--resume: {}: expected the manifest of a run, found {why}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The system refused.
    #[error("--resume: {0}")]
    File(#[from] FileError),
}

/// A field of the manifest that is not as this run needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its name.
    pub field: String,
    /// Of this run.
    pub expected: String,
    /// Of the folder.
    pub found: String,
}

impl ResumeError {
    /// What to do about it.
    pub fn help(&self) -> Option<&'static str> {
        match self {
            ResumeError::Foreign { .. } => {
                Some("give another folder, or start the run that this one belongs to with the same command")
            }
            ResumeError::NotOurs { .. } | ResumeError::Manifest { .. } => Some("give another folder"),
            ResumeError::Busy(_) | ResumeError::File(_) => None,
        }
    }
}

struct Lines<'a>(&'a [Difference]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|d| write!(f, "\n  {}: expected {}, found {}", d.field, d.expected, d.found))
    }
}

/// What a run depends on: all that its results may be reused for.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The hash of the model before any pass.
    pub model: [u8; 32],
    /// The hash of the calibration data, where a pass needs some.
    pub calibration: Option<[u8; 32]>,
    /// The pipeline with every option.
    pub pipeline: String,
    /// The flags that change what passes do.
    pub flags: String,
    /// The hash of the rules that were given, whatever their files are called.
    pub rules: Option<[u8; 32]>,
}

impl Identity {
    fn manifest(&self) -> Map<String, Json> {
        let hash = |h: &[u8; 32]| Json::from(format!("blake3:{}", to_hex(h)));
        let fields = [
            ("qcc", env!("CARGO_PKG_VERSION").into()),
            ("format", FORMAT.into()),
            ("model", hash(&self.model)),
            ("calibration", self.calibration.as_ref().map_or(Json::Null, hash)),
            ("pipeline", self.pipeline.as_str().into()),
            ("flags", self.flags.as_str().into()),
            ("rules", self.rules.as_ref().map_or(Json::Null, hash)),
        ];
        fields.map(|(name, value)| (name.to_string(), value)).into_iter().collect()
    }
}

fn differences(expected: &Map<String, Json>, found: &Map<String, Json>) -> Vec<Difference> {
    let show = |fields: &Map<String, Json>, name: &str| match fields.get(name) {
        None | Some(Json::Null) => "none".to_string(),
        Some(Json::String(s)) if s.is_empty() => "none".to_string(),
        Some(Json::String(s)) => s.clone(),
        Some(other) => other.to_string(),
    };
    let names = expected.keys().chain(found.keys().filter(|n| !expected.contains_key(*n)));
    let pairs =
        names.map(|n| Difference { field: n.clone(), expected: show(expected, n), found: show(found, n) });
    pairs.filter(|d| d.expected != d.found).collect()
}

/// A folder of finished work, held by this process.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    /// Keys the hashes of entries, so that those of another run are found out.
    seal: [u8; 32],
    done: Mutex<Done>,
    /// Locked until it is dropped.
    _lock: File,
}

/// Keys of entries by what became of them.
#[derive(Debug, Default)]
struct Done {
    taken: BTreeSet<Key>,
    kept: BTreeSet<Key>,
    damaged: BTreeSet<Key>,
}

impl Folder {
    /// Opens or makes the folder of the run that `run` is.
    pub fn open(dir: &Path, run: &Identity) -> Result<Folder, ResumeError> {
        let io = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| ResumeError::File(FileError::Io { doing, path, source })
        };
        fs::create_dir_all(dir).map_err(io("make the folder", dir))?;
        let path = dir.join(MANIFEST);
        let unfinished = |name: &str| name.starts_with('.') && name.ends_with(".tmp");
        let mut names = Vec::new();
        for entry in fs::read_dir(dir).map_err(io("read", dir))? {
            names.push(entry.map_err(io("read", dir))?.file_name().to_string_lossy().into_owned());
        }
        if !path.exists()
            && let Some(found) = names.iter().find(|n| *n != LOCK && !unfinished(n))
        {
            return Err(ResumeError::NotOurs { dir: dir.to_owned(), found: found.clone() });
        }
        let lock = dir.join(LOCK);
        let file = File::options().create(true).truncate(false).write(true).open(&lock);
        let file = file.map_err(io("write", &lock))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ResumeError::Busy(dir.to_owned())),
            // Not every file system can.
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(io("lock", &lock)(e)),
        }
        let expected = run.manifest();
        if path.exists() {
            let bad = |why: String| ResumeError::Manifest { path: path.clone(), why };
            let found: Json = serde_json::from_slice(&files::map(&path)?).map_err(|e| bad(e.to_string()))?;
            let found = found.as_object().ok_or_else(|| bad("no JSON object".into()))?;
            let differences = differences(&expected, found);
            if !differences.is_empty() {
                return Err(ResumeError::Foreign { dir: dir.to_owned(), differences });
            }
        } else {
            let text = serde_json::to_string_pretty(&expected).expect("a manifest is plain data");
            write(&path, &[text.as_bytes(), b"\n"])?;
        }
        for name in names.iter().filter(|n| unfinished(n)) {
            // What a killed run was writing. It does no harm when it cannot be removed.
            let _ = fs::remove_file(dir.join(name));
        }
        let seal = *blake3::hash(Json::Object(expected).to_string().as_bytes()).as_bytes();
        Ok(Folder { dir: dir.to_owned(), seal, done: Mutex::default(), _lock: file })
    }

    /// What was taken from the folder, kept in it, and found damaged.
    pub fn summary(&self) -> String {
        let done = self.done();
        let mut out = format!(
            "{}: {} taken from it, {} kept in it",
            self.dir.display(),
            count(done.taken.len(), "finished result"),
            done.kept.len()
        );
        if let n @ 1.. = done.damaged.len() {
            out.push_str(&format!("; {} made anew", count(n, "damaged result")));
        }
        out
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(to_hex(key))
    }

    fn hash(&self, key: &Key, content: &[u8]) -> [u8; 32] {
        *blake3::Hasher::new_keyed(&self.seal).update(key).update(content).finalize().as_bytes()
    }

    fn header(&self, key: &Key, content: &[u8]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        header[12..20].copy_from_slice(&(content.len() as u64).to_le_bytes());
        header[20..].copy_from_slice(&self.hash(key, content));
        header
    }

    fn done(&self) -> std::sync::MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Store for Folder {
    fn get(&self, key: &Key) -> Option<Vec<u8>> {
        let content = match files::map(&self.path(key)) {
            Err(FileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return None;
            }
            Err(_) => None,
            // The whole header follows from the content: one comparison finds whatever is wrong.
            Ok(bytes) => bytes.split_at_checked(HEADER).and_then(|(header, content)| {
                (self.header(key, content) == *header).then(|| content.to_vec())
            }),
        };
        let mut done = self.done();
        let list = if content.is_some() { &mut done.taken } else { &mut done.damaged };
        list.insert(*key);
        content
    }

    fn put(&self, key: &Key, value: &[u8]) -> Result<(), PassError> {
        write(&self.path(key), &[&self.header(key, value), value])
            .map_err(|e| PassError::Env(format!("--resume: {e}")))?;
        self.done().kept.insert(*key);
        Ok(())
    }
}

/// Writes a file, whole or not at all.
fn write(path: &Path, parts: &[&[u8]]) -> Result<(), FileError> {
    let mut out = OutputFile::create(path)?;
    for part in parts {
        out.write_all(part).map_err(|e| out.error(e))?;
    }
    out.commit()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn run() -> Identity {
        Identity {
            model: [1; 32],
            calibration: Some([2; 32]),
            pipeline: "awq,pack-int4".into(),
            flags: String::new(),
            rules: None,
        }
    }

    fn names(dir: &TempDir) -> Vec<String> {
        let entries = fs::read_dir(dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn entries_come_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let contents = [vec![], vec![0], (0..=255).collect::<Vec<u8>>(), vec![7; 1 << 20]];
        let key = |i: usize| [i as u8; 32];
        let folder = Folder::open(dir.path(), &run()).unwrap();
        assert_eq!(folder.get(&key(0)), None);
        for (i, content) in contents.iter().enumerate() {
            folder.put(&key(i), content).unwrap();
        }
        drop(folder);
        let folder = Folder::open(dir.path(), &run()).unwrap();
        for (i, content) in contents.iter().enumerate() {
            assert_eq!(folder.get(&key(i)).as_ref(), Some(content));
        }
        assert_eq!(folder.get(&key(9)), None);
        let at = dir.path().display();
        assert_eq!(folder.summary(), format!("{at}: 4 finished results taken from it, 0 kept in it"));
        assert_eq!(names(&dir).len(), 6);
        // What is there is replaced.
        folder.put(&key(0), b"new").unwrap();
        assert_eq!(folder.get(&key(0)).unwrap(), b"new");
    }

    #[test]
    fn every_damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path(), &run()).unwrap();
        let (key, other) = ([3; 32], [4; 32]);
        folder.put(&key, b"sixteen bytes...").unwrap();
        let path = folder.path(&key);
        let whole = fs::read(&path).unwrap();
        assert_eq!(whole.len(), HEADER + 16);
        let refused = |bytes: &[u8], what: &str| {
            fs::write(&path, bytes).unwrap();
            assert_eq!(folder.get(&key), None, "{what}");
        };
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                refused(&bytes, &format!("bit {bit} of byte {at} turned"));
            }
            refused(&whole[..at], &format!("cut after {at} bytes"));
        }
        refused(&[&whole[..], &[0]].concat(), "one byte more");
        let mut long = whole.clone();
        long[12..20].copy_from_slice(&u64::MAX.to_le_bytes());
        refused(&long, "a length that no file has");
        // That the check can pass at all, and that it is bound to the key and to the run.
        fs::write(&path, &whole).unwrap();
        assert_eq!(folder.get(&key).unwrap(), b"sixteen bytes...");
        fs::copy(&path, folder.path(&other)).unwrap();
        assert_eq!(folder.get(&other), None);
        let elsewhere = tempfile::tempdir().unwrap();
        let foreign = Folder::open(elsewhere.path(), &Identity { model: [9; 32], ..run() }).unwrap();
        fs::copy(&path, foreign.path(&key)).unwrap();
        assert_eq!(foreign.get(&key), None);
        assert!(foreign.summary().ends_with("1 damaged result made anew"), "{}", foreign.summary());
        // A folder in the place of an entry.
        fs::create_dir(folder.path(&[5; 32])).unwrap();
        assert_eq!(folder.get(&[5; 32]), None);
        assert!(folder.put(&[5; 32], b"x").is_err());
    }

    #[test]
    fn a_folder_of_another_run_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(Folder::open(dir.path(), &run()).unwrap());
        let differs = |run: Identity| match Folder::open(dir.path(), &run).unwrap_err() {
            ResumeError::Foreign { differences, .. } => {
                let d: Vec<_> = differences.into_iter().map(|d| (d.field, d.expected, d.found)).collect();
                d
            }
            e => panic!("{e}"),
        };
        let hash = |byte: u8| format!("blake3:{}", to_hex(&[byte; 32]));
        let triple = |a: &str, b: &str, c: &str| (a.to_string(), b.to_string(), c.to_string());
        assert_eq!(differs(Identity { model: [8; 32], ..run() }), [triple("model", &hash(8), &hash(1))]);
        assert_eq!(
            differs(Identity { calibration: None, pipeline: "rtn".into(), ..run() }),
            [triple("calibration", "none", &hash(2)), triple("pipeline", "rtn", "awq,pack-int4")]
        );
        assert_eq!(
            differs(Identity { flags: "--tied shared".into(), ..run() }),
            [triple("flags", "--tied shared", "none")]
        );
        assert_eq!(differs(Identity { rules: Some([5; 32]), ..run() }), [triple("rules", &hash(5), "none")]);
        // A field that this version does not know.
        let path = dir.path().join(MANIFEST);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replacen('{', "{ \"more\": 1,", 1)).unwrap();
        assert_eq!(differs(run()), [triple("more", "none", "1")]);
        fs::write(&path, text.replace(env!("CARGO_PKG_VERSION"), "0.0.1")).unwrap();
        assert_eq!(differs(run()), [triple("qcc", env!("CARGO_PKG_VERSION"), "0.0.1")]);
        let message = Folder::open(dir.path(), &run()).unwrap_err().to_string();
        assert!(message.contains("belongs to another run:\n  qcc: expected "), "{message}");
        for damaged in ["", "[]", "{\"qcc\": 1", "\u{0}"] {
            fs::write(&path, damaged).unwrap();
            let e = Folder::open(dir.path(), &run()).unwrap_err();
            assert!(matches!(e, ResumeError::Manifest { .. }), "{damaged:?}: {e}");
        }
        fs::write(&path, text).unwrap();
        assert!(Folder::open(dir.path(), &run()).is_ok());
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = Folder::open(dir.path(), &run()).unwrap();
        let second = Folder::open(dir.path(), &run());
        assert!(matches!(second, Err(ResumeError::Busy(_))));
        drop(first);
        assert!(Folder::open(dir.path(), &run()).is_ok());
    }

    #[test]
    fn only_a_folder_of_its_own_is_used() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "").unwrap();
        let e = Folder::open(dir.path(), &run()).unwrap_err();
        assert!(e.to_string().contains("thesis.tex"), "{e}");
        assert_eq!(names(&dir), ["thesis.tex"]);
        assert!(Folder::open(&dir.path().join("thesis.tex"), &run()).is_err());
        // What a run left that was killed before it had written its manifest, or while it wrote an entry.
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(LOCK), "").unwrap();
        fs::write(dir.path().join(".manifest.json.abc.tmp"), "{").unwrap();
        let folder = Folder::open(&dir.path().join("."), &run()).unwrap();
        assert_eq!(names(&dir), [LOCK, MANIFEST]);
        drop(folder);
        fs::write(dir.path().join(".0123.abc.tmp"), "qcc-").unwrap();
        drop(Folder::open(dir.path(), &run()).unwrap());
        assert_eq!(names(&dir), [LOCK, MANIFEST]);
        // Folders that do not exist yet are made.
        assert!(Folder::open(&dir.path().join("a/b"), &run()).is_ok());
    }
}
