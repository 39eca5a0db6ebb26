//! Files: memory maps to read from, and outputs that appear whole or not at all.
//!
//! An output is written beside its target under a temporary name and renamed when it is complete, so a failure, a full
//! disk or an interrupt leaves an existing target as it was. [`remove_unfinished`] is what an interrupt handler calls.

use bytes::Bytes;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tempfile::NamedTempFile;
use thiserror::Error;

/// A failure to read or write a file.
#[derive(Debug, Error)]
pub enum FileError {
    /// The system refused.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was attempted: `read`, `write`, ...
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A directory, or something else that cannot be mapped.
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// The folder of an output does not exist.
    #[error("cannot write {}: there is no folder {}", path.display(), folder.display())]
    NoFolder {
        /// The output.
        path: PathBuf,
        /// Where it was to be.
        folder: PathBuf,
    },
    /// Writing the output would destroy an input.
    #[error("the output {} is also an input ({})", output.display(), input.display())]
    OutputIsInput {
        /// The output.
        output: PathBuf,
        /// The input that is the same file.
        input: PathBuf,
    },
}

impl FileError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
        move |source| FileError::Io { doing, path: path.to_owned(), source }
    }
}

/// Maps a file into memory. Nothing is read until it is looked at.
pub fn map(path: &Path) -> Result<Bytes, FileError> {
    let file = File::open(path).map_err(FileError::io("read", path))?;
    let meta = file.metadata().map_err(FileError::io("read", path))?;
    if !meta.is_file() {
        return Err(FileError::NotAFile(path.to_owned()));
    }
    if meta.len() == 0 {
        return Ok(Bytes::new());
    }
    Ok(Bytes::from_owner(map_file(&file).map_err(FileError::io("map", path))?))
}

/// A zeroed buffer of `len` bytes in a file without a name in `folder`, gone with the last use of it.
pub fn scratch(folder: &Path, len: usize) -> Result<memmap2::MmapMut, FileError> {
    let file = tempfile::tempfile_in(folder).map_err(FileError::io("write", folder))?;
    reserve(&file, len as u64).map_err(FileError::io("write", folder))?;
    map_scratch(&file).map_err(FileError::io("map", folder))
}

/// Makes a file `len` bytes long, with its disk space reserved: a disk that fills up while a map is written to would
/// end the process, without a word.
fn reserve(file: &File, len: u64) -> io::Result<()> {
    file.set_len(len)?;
    #[cfg(target_os = "linux")]
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
        // Not every file system can.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
        Err(e) => return Err(e.into()),
    }
    Ok(())
}

#[allow(unsafe_code)]
fn map_scratch(file: &File) -> io::Result<memmap2::MmapMut> {
    // SAFETY: the file has no name and was made by this process, so no other one can change it.
    unsafe { memmap2::MmapMut::map_mut(file) }
}

/// Maps a file for reading.
#[allow(unsafe_code)]
fn map_file(file: &File) -> io::Result<memmap2::Mmap> {
    // SAFETY: the map is private and only read. What no program can rule out is that another process shortens or
    // rewrites the file meanwhile: then a read faults or sees changed numbers, as with any memory-mapped model. The
    // program itself never opens an existing file for writing: its outputs are new files, renamed when complete.
    unsafe { memmap2::Mmap::map(file) }
}

/// Refuses an output that is one of the inputs, whatever path leads to it.
pub fn refuse_overwrite(output: &Path, inputs: &[PathBuf]) -> Result<(), FileError> {
    let Ok(out) = fs::metadata(output) else { return Ok(()) };
    for input in inputs {
        if fs::metadata(input).is_ok_and(|meta| same_file(output, &out, input, &meta)) {
            return Err(FileError::OutputIsInput { output: output.to_owned(), input: input.clone() });
        }
    }
    Ok(())
}

#[cfg(unix)]
fn same_file(_: &Path, a: &Metadata, _: &Path, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(a: &Path, _: &Metadata, b: &Path, _: &Metadata) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

/// Temporary files that are being written.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes every temporary file that is being written, and lets no other one be started: call it right before leaving
/// on an interrupt.
pub fn remove_unfinished() {
    let mut list = UNFINISHED.lock().unwrap_or_else(|e| e.into_inner());
    for path in list.drain(..) {
        // Best effort on the way out: there is nobody left to tell.
        let _ = fs::remove_file(path);
    }
    std::mem::forget(list);
}

/// A file being written. Dropped without [`OutputFile::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct OutputFile {
    target: PathBuf,
    sink: Sink,
}

#[derive(Debug)]
enum Sink {
    Temporary(Temporary),
    /// A device or pipe, such as `/dev/null`, which a rename would replace.
    Direct(File),
}

/// A temporary file and its entry in [`UNFINISHED`]. The file is `None` only once it was committed.
#[derive(Debug)]
struct Temporary(Option<NamedTempFile>);

impl Temporary {
    /// Ends the file by `end`, and only then its entry, so that an interrupt in between still finds it.
    fn finish<T>(&mut self, end: impl FnOnce(NamedTempFile) -> T) -> Option<T> {
        let file = self.0.take()?;
        let path = file.path().to_owned();
        let result = end(file);
        UNFINISHED.lock().unwrap_or_else(|e| e.into_inner()).retain(|p| *p != path);
        Some(result)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        self.finish(drop);
    }
}

impl OutputFile {
    /// Starts writing what will be `target`. A link is followed: the file it points to is replaced.
    pub fn create(target: &Path) -> Result<OutputFile, FileError> {
        let existing = fs::metadata(target).ok();
        if existing.as_ref().is_some_and(Metadata::is_dir) {
            return Err(FileError::NotAFile(target.to_owned()));
        }
        if existing.as_ref().is_some_and(|m| !m.is_file()) {
            let file = File::options().write(true).open(target).map_err(FileError::io("write", target))?;
            return Ok(OutputFile { target: target.to_owned(), sink: Sink::Direct(file) });
        }
        let target = match existing {
            Some(_) => fs::canonicalize(target).map_err(FileError::io("write", target))?,
            None => target.to_owned(),
        };
        let folder = match target.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        if !folder.is_dir() {
            return Err(FileError::NoFolder { folder: folder.to_owned(), path: target });
        }
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(target.file_name().unwrap_or_default());
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".tmp");
        #[cfg(unix)]
        {
            // Those of a file created plainly; the umask applies.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        // The lock covers creation, so that an interrupt cannot fall between it and the registration.
        let mut list = UNFINISHED.lock().unwrap_or_else(|e| e.into_inner());
        // The error itself would name the temporary file.
        let plain = |e: io::Error| FileError::io("write", &target)(e.kind().into());
        let file = builder.tempfile_in(folder).map_err(plain)?;
        list.push(file.path().to_owned());
        drop(list);
        if let Some(meta) = existing {
            // A file replaced keeps its permissions.
            file.as_file().set_permissions(meta.permissions()).map_err(FileError::io("write", &target))?;
        }
        Ok(OutputFile { target, sink: Sink::Temporary(Temporary(Some(file))) })
    }

    /// The path that will hold the file.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Puts the file in its place.
    pub fn commit(mut self) -> Result<(), FileError> {
        self.flush().map_err(FileError::io("write", &self.target))?;
        let Sink::Temporary(temporary) = &mut self.sink else { return Ok(()) };
        let moved = temporary.finish(|file| file.persist(&self.target));
        moved.transpose().map(drop).map_err(|e| self.error(e.error))
    }

    /// An error of writing to this file.
    pub fn error(&self, source: io::Error) -> FileError {
        FileError::Io { doing: "write", path: self.target.clone(), source }
    }
}

impl Write for OutputFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.sink.file()?.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.file()?.flush()
    }
}

impl Sink {
    fn file(&mut self) -> io::Result<&mut File> {
        match self {
            Sink::Temporary(Temporary(Some(file))) => Ok(file.as_file_mut()),
            Sink::Temporary(Temporary(None)) => Err(io::Error::other("the file is committed")),
            Sink::Direct(file) => Ok(file),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn an_output_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.bin");
        fs::write(&target, "before").unwrap();
        let mut out = OutputFile::create(&target).unwrap();
        out.write_all(b"half").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"before");
        assert_eq!(names(dir.path()).len(), 2);
        drop(out);
        assert_eq!(
            (fs::read(&target).unwrap().as_slice(), names(dir.path()).len()),
            (b"before".as_slice(), 1)
        );
        let mut out = OutputFile::create(&target).unwrap();
        out.write_all(b"after").unwrap();
        out.commit().unwrap();
        assert_eq!(
            (fs::read(&target).unwrap().as_slice(), names(dir.path()).len()),
            (b"after".as_slice(), 1)
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_new_output_has_the_permissions_of_a_plain_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        fs::write(dir.path().join("plain"), "").unwrap();
        OutputFile::create(&dir.path().join("new")).unwrap().commit().unwrap();
        assert_eq!(mode("new"), mode("plain"));
        fs::set_permissions(dir.path().join("new"), fs::Permissions::from_mode(0o640)).unwrap();
        OutputFile::create(&dir.path().join("new")).unwrap().commit().unwrap();
        assert_eq!(mode("new") & 0o777, 0o640);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_kept() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("real"), "1").unwrap();
        std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
        let mut out = OutputFile::create(&dir.path().join("link")).unwrap();
        out.write_all(b"2").unwrap();
        out.commit().unwrap();
        assert!(dir.path().join("link").is_symlink());
        assert_eq!(fs::read(dir.path().join("real")).unwrap(), b"2");
        let mut null = OutputFile::create(Path::new("/dev/null")).unwrap();
        null.write_all(b"gone").unwrap();
        null.commit().unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[cfg(unix)]
    #[test]
    fn an_input_is_never_an_output() {
        let dir = tempfile::tempdir().unwrap();
        let (input, hard, other) = (dir.path().join("in"), dir.path().join("hard"), dir.path().join("other"));
        fs::write(&input, "1").unwrap();
        fs::write(&other, "1").unwrap();
        fs::hard_link(&input, &hard).unwrap();
        let inputs = [input.clone()];
        assert!(matches!(refuse_overwrite(&input, &inputs), Err(FileError::OutputIsInput { .. })));
        assert!(matches!(refuse_overwrite(&hard, &inputs), Err(FileError::OutputIsInput { .. })));
        assert!(refuse_overwrite(&other, &inputs).is_ok());
        assert!(refuse_overwrite(&dir.path().join("new"), &inputs).is_ok());
    }

    /// A full disk: the write fails, and what was there stays.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_failed_write_is_an_error() {
        let mut full = OutputFile::create(Path::new("/dev/full")).unwrap();
        let error = full.write_all(b"x").unwrap_err();
        let error = full.error(error).to_string();
        assert!(error.starts_with("cannot write /dev/full"), "{error}");
    }

    #[test]
    fn scratch_is_zeroed_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut map = scratch(dir.path(), 10_000).unwrap();
        assert!(map.len() == 10_000 && map.iter().all(|&b| b == 0));
        map[9_999] = 7;
        assert_eq!(names(dir.path()), [""; 0]);
        assert!(scratch(&dir.path().join("none"), 1).is_err());
        // More than any disk has.
        let error = scratch(dir.path(), 1 << 50).unwrap_err().to_string();
        assert!(error.starts_with("cannot write "), "{error}");
    }

    #[test]
    fn maps_are_of_regular_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "").unwrap();
        assert!(map(&file).unwrap().is_empty());
        fs::write(&file, "abc").unwrap();
        assert_eq!(map(&file).unwrap(), "abc");
        assert!(matches!(map(dir.path()), Err(FileError::NotAFile(_)) | Err(FileError::Io { .. })));
        let error = map(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read ") && error.contains("none"), "{error}");
    }
}
