//! Arrays in numpy's `.npy` and `.npz` files.
//!
//! A `.npy` file is the magic bytes, a version, the length of a header, the header (a Python dict of `descr`,
//! `fortran_order` and `shape`) and the elements. The format is numpy's enhancement proposal 1. A `.npz` file is a zip
//! archive of them. Lengths are checked against the bytes that are there before anything is allocated.

use crate::files::{self, FileError};
use bytes::Bytes;
use dialects::ir::{ConstData, Elem};
use dialects::tensor::Tensor;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// Deflate turns at most 1032 bytes into one, so a longer entry cannot be honest.
const MAX_DEFLATE: u64 = 1032;

/// Headers are padded to a multiple of 64 bytes; numpy refuses those beyond this length, too.
const MAX_HEADER: usize = 10_000;

/// Why a file of arrays cannot be read.
#[derive(Debug, Error)]
pub enum NpyError {
    /// The file cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file, or an array in it, is not what it should be.
    #[error("{}: {what}", path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        what: String,
    },
}

/// An array, its bytes not copied where the file holds them little-endian and row-major.
#[derive(Clone, Debug)]
pub struct Array {
    /// The element type.
    pub elem: Elem,
    /// The shape, outermost first.
    pub shape: Vec<usize>,
    /// Elements, little-endian, row-major.
    data: Bytes,
}

impl Array {
    /// The number of elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements `start .. start + shape.product()` of the array seen flat, in the shape `shape`.
    /// `None` when they are not all there.
    pub fn window(&self, start: usize, shape: &[usize]) -> Option<Tensor> {
        let size = self.elem.bits() / 8;
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let end = start.checked_add(count).filter(|&end| end <= self.count())?;
        let bytes = self.data.slice(start * size..end * size);
        let dims = shape.iter().map(|&d| d as u64).collect();
        let data = ConstData::new(self.elem, dims, Arc::new(bytes)).ok()?;
        Tensor::from_const(&data).ok()
    }

    /// The rows `rows` (indices into the first dim, which the array has), one after another.
    pub fn rows(&self, rows: &[usize]) -> Tensor {
        let mut shape = self.shape.clone();
        let row = shape[1..].iter().product::<usize>() * (self.elem.bits() / 8);
        let data = rows.iter().flat_map(|&r| &self.data[r * row..][..row]).copied().collect();
        shape[0] = rows.len();
        Array { elem: self.elem, shape, data }.tensor()
    }

    /// The whole array.
    pub fn tensor(&self) -> Tensor {
        self.window(0, &self.shape).expect("an array holds all its elements")
    }
}

/// Reads the array in a `.npy` file.
pub fn read(path: &Path) -> Result<Array, NpyError> {
    let bytes = files::map(path)?;
    parse(&bytes).map_err(|what| NpyError::Bad { path: path.to_owned(), what })
}

/// Arrays with their names, and the names of all arrays in the file.
type Named = (Vec<(String, Array)>, Vec<String>);

/// Reads the arrays of a `.npz` file whose names `keep` accepts, in the archive's order, and the names of all.
pub fn read_npz(path: &Path, keep: impl Fn(&str) -> bool) -> Result<Named, NpyError> {
    let bytes = files::map(path)?;
    let bad = |what: String| NpyError::Bad { path: path.to_owned(), what };
    let limit = (bytes.len() as u64).saturating_mul(MAX_DEFLATE);
    let mut archive = npyz::npz::NpzArchive::new(io::Cursor::new(&bytes))
        .map_err(|e| bad(format!("not a .npz archive: {e}")))?;
    let zip = archive.zip_archive();
    let (mut arrays, mut names) = (Vec::new(), Vec::new());
    for i in 0..zip.len() {
        let mut entry = zip.by_index(i).map_err(|e| bad(format!("entry {i}: {e}")))?;
        let Some(name) = npyz::npz::array_name_from_file_name(entry.name()).map(str::to_owned) else {
            continue;
        };
        names.push(name.clone());
        if !keep(&name) {
            continue;
        }
        let size = entry.size();
        if size > limit {
            return Err(bad(format!("array {name:?}: {size} bytes cannot come from {} bytes", bytes.len())));
        }
        let mut data = Vec::new();
        (&mut entry).take(size).read_to_end(&mut data).map_err(|e| bad(format!("array {name:?}: {e}")))?;
        let array = parse(&Bytes::from(data)).map_err(|what| bad(format!("array {name:?}: {what}")))?;
        arrays.push((name, array));
    }
    Ok((arrays, names))
}

/// Parses the bytes of a `.npy` file.
fn parse(bytes: &Bytes) -> Result<Array, String> {
    let rest = bytes.strip_prefix(b"\x93NUMPY").ok_or("not a .npy file: the magic bytes are missing")?;
    let short = "the file ends inside its header";
    let (header, start) = match rest {
        [1, _, a, b, rest @ ..] => (rest, usize::from(u16::from_le_bytes([*a, *b]))),
        [2 | 3, _, a, b, c, d, rest @ ..] => (rest, u32::from_le_bytes([*a, *b, *c, *d]) as usize),
        [version, ..] => return Err(format!("version {version} of the .npy format; 1 to 3 are known")),
        [] => return Err(short.into()),
    };
    if start > MAX_HEADER {
        return Err(format!("a header of {start} bytes; at most {MAX_HEADER} are expected"));
    }
    let (header, data) = header.split_at_checked(start).ok_or(short)?;
    let header = std::str::from_utf8(header).map_err(|_| "the header is not text".to_string())?;
    let descr = field(header, "descr")
        .and_then(quoted)
        .ok_or_else(|| "the header has no plain `descr`; structured arrays are not supported".to_string())?;
    let fortran = match field(header, "fortran_order") {
        Some(v) if v.starts_with("True") => true,
        Some(v) if v.starts_with("False") => false,
        _ => return Err("the header has no `fortran_order`".into()),
    };
    let shape = field(header, "shape").and_then(dims).ok_or("the header has no legal `shape`")?;
    let (elem, swap) =
        element(descr).ok_or_else(|| format!("arrays of dtype {descr:?} are not supported"))?;
    let size = elem.bits() / 8;
    let wanted = shape.iter().try_fold(size, |n, &d| n.checked_mul(d));
    let wanted =
        wanted.ok_or_else(|| format!("the shape {shape:?} has more elements than can be counted"))?;
    if wanted != data.len() {
        return Err(format!(
            "dtype {descr} and shape {shape:?} need {wanted} bytes of data, the file has {}",
            data.len()
        ));
    }
    let mut data = bytes.slice_ref(data);
    if swap {
        data = data.chunks(size).flat_map(|e| e.iter().rev().copied()).collect::<Vec<u8>>().into();
    }
    if fortran && shape.len() > 1 {
        data = row_major(&data, &shape, size).into();
    }
    Ok(Array { elem, shape, data })
}

/// What stands after the key `name` of a Python dict.
fn field<'a>(header: &'a str, name: &str) -> Option<&'a str> {
    let quoted = [format!("'{name}'"), format!("\"{name}\"")];
    let at = quoted.iter().find_map(|q| header.find(q.as_str()).map(|i| i + q.len()))?;
    header[at..].trim_start().strip_prefix(':').map(str::trim_start)
}

/// The text of a quoted string that `s` begins with.
fn quoted(s: &str) -> Option<&str> {
    let quote = s.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    s[1..].split_once(quote).map(|(text, _)| text)
}

/// The numbers of a tuple that `s` begins with.
fn dims(s: &str) -> Option<Vec<usize>> {
    let (inside, _) = s.strip_prefix('(')?.split_once(')')?;
    let items = inside.split(',').map(str::trim).filter(|d| !d.is_empty());
    items.map(|d| d.parse().ok()).collect()
}

/// The element type of a dtype such as `<i8`, and whether its bytes stand the other way round.
fn element(descr: &str) -> Option<(Elem, bool)> {
    let (order, kind) = descr.split_at_checked(1)?;
    let elem = match kind {
        "f2" => Elem::F16,
        "f4" => Elem::F32,
        "f8" => Elem::F64,
        "i1" => Elem::I8,
        "i2" => Elem::I16,
        "i4" => Elem::I32,
        "i8" => Elem::I64,
        "u1" => Elem::U8,
        "u2" => Elem::U16,
        "u4" => Elem::U32,
        "u8" => Elem::U64,
        "b1" => Elem::Bool,
        _ => return None,
    };
    match order {
        "<" | "|" => Some((elem, false)),
        ">" => Some((elem, elem.bits() > 8)),
        _ => None,
    }
}

/// Column-major elements of `size` bytes, as row-major ones.
fn row_major(data: &[u8], shape: &[usize], size: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    let mut index = vec![0usize; shape.len()];
    for _ in 0..data.len() / size {
        let flat = index.iter().zip(shape).rev().fold(0, |at, (&i, &d)| at * d + i);
        out.extend_from_slice(&data[flat * size..(flat + 1) * size]);
        for (i, &d) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < d {
                break;
            }
            *i = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file as numpy writes it: `header` padded so that the data begins at a multiple of 64.
    fn npy(header: &str, data: &[u8]) -> Bytes {
        let mut out = b"\x93NUMPY\x01\x00".to_vec();
        let padded = (header.len() + 11).div_ceil(64) * 64 - 10;
        out.extend((padded as u16).to_le_bytes());
        out.extend(format!("{header:<width$}\n", width = padded - 1).bytes());
        out.extend(data);
        out.into()
    }

    fn header(descr: &str, fortran: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}")
    }

    #[test]
    fn dtypes_orders_and_ranks() {
        let bytes = npy(
            &header("<i8", "False", "(2,)"),
            &[1, 0, 0, 0, 0, 0, 0, 0, 254, 255, 255, 255, 255, 255, 255, 255],
        );
        let a = parse(&bytes).unwrap();
        assert_eq!(
            (a.elem, a.shape.as_slice(), a.tensor().i64s().unwrap()),
            (Elem::I64, &[2][..], &[1, -2][..])
        );
        let a = parse(&npy(&header(">u2", "False", "(1, 2)"), &[1, 2, 3, 4])).unwrap();
        assert_eq!(a.tensor().to_i64().unwrap().as_ref(), &[0x0102, 0x0304]);
        // np.asfortranarray([[0, 1, 2], [3, 4, 5]]) stores columns.
        let a = parse(&npy(&header("|u1", "True", "(2, 3)"), &[0, 3, 1, 4, 2, 5])).unwrap();
        assert_eq!(a.tensor().u8s().unwrap(), &[0, 1, 2, 3, 4, 5]);
        let a = parse(&npy(&header("<f4", "False", "()"), &1.5f32.to_le_bytes())).unwrap();
        assert_eq!(a.tensor().f32s().unwrap(), &[1.5]);
        assert!(a.tensor().shape().is_empty());
        let a = parse(&npy(&header("|b1", "False", "(0, 7)"), &[])).unwrap();
        assert_eq!((a.count(), a.elem), (0, Elem::Bool));
    }

    #[test]
    fn windows_are_bounded() {
        let a = parse(&npy(&header("|u1", "False", "(2, 3)"), &[0, 1, 2, 3, 4, 5])).unwrap();
        assert_eq!(a.window(2, &[1, 3]).unwrap().u8s().unwrap(), &[2, 3, 4]);
        assert!(a.window(4, &[3]).is_none());
        assert!(a.window(usize::MAX, &[2]).is_none());
        assert!(a.window(0, &[usize::MAX, 2]).is_none());
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        let fails = |bytes: &[u8]| parse(&Bytes::copy_from_slice(bytes)).unwrap_err();
        assert!(fails(b"hello").contains("magic"));
        assert!(fails(b"\x93NUMPY").contains("ends inside"));
        assert!(fails(b"\x93NUMPY\x01\x00\xff\x00{").contains("ends inside"));
        assert!(fails(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{").contains("at most"));
        assert!(fails(b"\x93NUMPY\x09\x00\x00\x00").contains("version 9"));
        let of = |descr: &str, shape: &str, data: &[u8]| fails(&npy(&header(descr, "False", shape), data));
        assert!(of("|O", "(1,)", b"12345678").contains("|O"));
        assert!(of("<U4", "(1,)", b"1234").contains("<U4"));
        assert!(of("<i8", "(2,)", b"12345678").contains("need 16 bytes of data, the file has 8"));
        assert!(of("<i8", "(4611686018427387904, 4)", b"").contains("more elements"));
        assert!(of("<i8", "(-1,)", b"").contains("shape"));
        assert!(of("<i8", "(99999999999999999999999,)", b"").contains("shape"));
        assert!(
            fails(&npy("{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': ()}", b""))
                .contains("structured")
        );
        for len in 0..90 {
            let whole = npy(&header("<i8", "False", "(2,)"), &[7; 16]);
            let _ = fails(&whole[..len]);
        }
    }

    #[test]
    fn npz_archives() {
        use npyz::WriterBuilder;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npz");
        let mut npz = npyz::npz::NpzWriter::create(&path).unwrap();
        for (name, values) in [("x", vec![1.0f32, 2.0]), ("y", vec![3.0])] {
            let entry = npz.array(name, Default::default()).unwrap();
            let mut w = entry.default_dtype().shape(&[values.len() as u64]).begin_nd().unwrap();
            w.extend(values).unwrap();
            w.finish().unwrap();
        }
        drop(npz);
        let (arrays, names) = read_npz(&path, |n| n == "x").unwrap();
        assert_eq!(names, ["x", "y"]);
        assert_eq!(arrays.len(), 1);
        assert_eq!(arrays[0].1.tensor().f32s().unwrap(), &[1.0, 2.0]);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let error = read_npz(&path, |_| true).unwrap_err().to_string();
        assert!(error.contains("a.npz: not a .npz archive"), "{error}");
    }
}
