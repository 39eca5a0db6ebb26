//! Constants whose bytes stand elsewhere: the large tensors of a `.qir` are known by type and BLAKE3 hash, and
//! [`bind`] gives them their bytes. What is read is checked against the hash, once.

use super::literal::to_hex;
use super::{ConstError, ConstId, Elem, Module, TensorSource};
use bytes::Bytes;
use std::sync::{Arc, OnceLock};

/// A BLAKE3 hash.
pub type Hash = [u8; 32];

/// The source of a constant that is known by its hash alone, or not even by that.
#[derive(Clone, Debug)]
pub struct Unbound {
    /// The hash, if the text gave it.
    pub hash: Option<Hash>,
    /// The length in bytes by type and shape; 0 where these do not tell (strings, sparse tensors).
    pub len: u64,
}

impl TensorSource for Unbound {
    fn byte_len(&self) -> u64 {
        self.len
    }

    fn read(&self) -> Result<Bytes, ConstError> {
        let what = self.hash.map_or_else(|| "without a hash".into(), |h| format!("#blake3:{}", to_hex(&h)));
        Err(ConstError::Unavailable(format!(
            "the text came without its weights: no data for the tensor {what}"
        )))
    }

    fn known_hash(&self) -> Option<Hash> {
        self.hash
    }

    fn is_bound(&self) -> bool {
        false
    }
}

/// A source whose hash was recorded: the first read checks it.
#[derive(Debug)]
struct Checked {
    source: Arc<dyn TensorSource>,
    hash: Hash,
    checked: OnceLock<()>,
}

impl TensorSource for Checked {
    fn byte_len(&self) -> u64 {
        self.source.byte_len()
    }

    fn read(&self) -> Result<Bytes, ConstError> {
        let bytes = self.source.read()?;
        if self.checked.get().is_none() {
            let found = *blake3::hash(&bytes).as_bytes();
            if found != self.hash {
                return Err(ConstError::Hash { expected: to_hex(&self.hash), found: to_hex(&found) });
            }
            self.checked.get_or_init(|| ());
        }
        Ok(bytes)
    }

    fn known_hash(&self) -> Option<Hash> {
        Some(self.hash)
    }
}

/// Gives bytes to the constants that have none: `lookup` finds them by hash. The lengths are compared now, the
/// hash when the bytes are first read. Returns the constants for which nothing was found.
pub fn bind(
    m: &mut Module,
    mut lookup: impl FnMut(&Hash) -> Option<Arc<dyn TensorSource>>,
) -> Result<Vec<ConstId>, ConstError> {
    let mut missing = Vec::new();
    for (id, data) in m.consts.iter_mut() {
        if data.source.is_bound() {
            continue;
        }
        let found = data.source.known_hash().and_then(|hash| Some((hash, lookup(&hash)?)));
        let Some((hash, source)) = found else {
            missing.push(id);
            continue;
        };
        let (expected, found) = (data.source.byte_len(), source.byte_len());
        if expected != found && data.elem != Elem::String && data.encoding != super::Encoding::Sparse {
            return Err(ConstError::Length { expected, found });
        }
        data.source = Arc::new(Checked { source, hash, checked: OnceLock::new() });
    }
    Ok(missing)
}
