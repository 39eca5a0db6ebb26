//! Writes arrays as one of numpy's `.npz` archives, uncompressed, as `numpy.savez` does.

use super::inputs::widened;
use crate::error::Error;
use crate::files::OutputFile;
use dialects::ir::Elem;
use dialects::onnx::cast::convert;
use dialects::tensor::{Data, Tensor};
use npyz::npz::NpzWriter;
use npyz::{AutoSerialize, WriterBuilder};
use std::io::{self, Cursor, Seek, Write};
use std::path::Path;

/// Writes `arrays` to `path`, whole or not at all. Elements that numpy has no type for are widened (see [`widened`]).
/// Returns the bytes written.
pub fn write(path: &Path, arrays: &[(String, Tensor)]) -> Result<u64, Error> {
    let mut npz = NpzWriter::new(Cursor::new(Vec::new()));
    for (name, t) in arrays {
        array(&mut npz, name, t)
            .map_err(|e| Error::Data(format!("{}: array {name:?}: {e}", path.display())))?;
    }
    let failed = |e: &dyn std::fmt::Display| Error::Data(format!("{}: {e}", path.display()));
    let bytes = npz.zip_writer().finish().map_err(|e| failed(&e))?.into_inner();
    let mut out = OutputFile::create(path)?;
    out.write_all(&bytes).map_err(|e| out.error(e))?;
    out.commit()?;
    Ok(bytes.len() as u64)
}

fn array<W: Write + Seek>(npz: &mut NpzWriter<W>, name: &str, t: &Tensor) -> io::Result<()> {
    let wide = convert(t, widened(t.elem()), false).map_err(io::Error::other)?;
    let shape: Vec<u64> = wide.shape().iter().map(|&n| n as u64).collect();
    match wide.data() {
        Data::F64(v) => put(npz, name, &shape, v),
        Data::F32(v) => put(npz, name, &shape, v),
        Data::F16(v) => put(npz, name, &shape, v),
        Data::I64(v) => put(npz, name, &shape, v),
        Data::I32(v) => put(npz, name, &shape, v),
        Data::I16(v) => put(npz, name, &shape, v),
        Data::I8(v) => put(npz, name, &shape, v),
        Data::U64(v) => put(npz, name, &shape, v),
        Data::U32(v) => put(npz, name, &shape, v),
        Data::U16(v) => put(npz, name, &shape, v),
        Data::U8(v) => put(npz, name, &shape, v),
        Data::Bool(v) => put(npz, name, &shape, v),
        Data::BF16(_) | Data::C64(_) | Data::C128(_) | Data::Str(_) => {
            let elem: Elem = t.elem();
            Err(io::Error::other(format!("elements of type {elem} are not written to .npz")))
        }
    }
}

fn put<W: Write + Seek, T: AutoSerialize + Clone>(
    npz: &mut NpzWriter<W>,
    name: &str,
    shape: &[u64],
    v: &[T],
) -> io::Result<()> {
    let large = size_of_val(v) as u64 >= u64::from(u32::MAX);
    let options = npyz::zip::write::FileOptions::default()
        .compression_method(npyz::zip::CompressionMethod::Stored)
        .large_file(large);
    let mut writer = npz.array(name, options)?.default_dtype().shape(shape).begin_nd()?;
    writer.extend(v.iter().cloned())?;
    writer.finish()
}
