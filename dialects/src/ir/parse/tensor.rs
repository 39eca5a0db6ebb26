//! Tensors in the text form: elements, bytes, a hash, or a rule that makes them.

use super::super::bind::Unbound;
use super::super::literal::{ElementWriter, from_hex};
use super::super::{ConstData, ConstError, Elem, Encoding, TensorSource};
use super::MAX_GENERATED;
use super::grammar::Rule;
use super::leaf::{Node, Result, bytes_of, dict, elem, inner, invalid, number};
use bytes::Bytes;
use std::sync::Arc;

/// Reads `tensor<2xf32> [1.0, 2.0]` and its other forms.
pub(super) fn read(p: Node) -> Result<ConstData> {
    let whole = p.clone();
    let mut parts = p.into_inner().skip(1);
    let mut next = || parts.next().expect("the grammar gives the tensor its parts");
    let dims = next().into_inner().map(inner).map(|d| number(&d, "a size")).collect::<Result<Vec<u64>>>()?;
    let elem = elem(&next())?;
    let mut encoding = Encoding::Raw;
    let mut meta = None;
    let data = loop {
        let part = next();
        match part.as_rule() {
            Rule::encoding if part.as_str() == "sparse" => encoding = Encoding::Sparse,
            Rule::encoding => encoding = Encoding::Typed,
            Rule::dict => meta = Some(dict(part)?),
            _ => break part,
        }
    };
    let count = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let len = count.and_then(|n| elem.byte_len(n));
    let source: Arc<dyn TensorSource> = match data.as_rule() {
        Rule::hash => Arc::new(unbound(data, len.unwrap_or(0))?),
        Rule::bytes => match from_hex(&String::from_utf8_lossy(&bytes_of(&inner(data.clone()))?)) {
            Some(bytes) => Arc::new(Bytes::from(bytes)),
            None => return invalid(&data, "expected pairs of hexadecimal digits"),
        },
        Rule::generated => match count {
            Some(count) if count <= MAX_GENERATED => Arc::new(generated(elem, count, data)?),
            _ => {
                return invalid(
                    &whole,
                    format!("expected at most {MAX_GENERATED} generated elements, found more"),
                );
            }
        },
        rule => {
            let bare = rule == Rule::element;
            if bare && !dims.is_empty() {
                return invalid(&data, "expected the elements in brackets, found one without");
            }
            let items = if bare { vec![data.clone()] } else { data.clone().into_inner().collect() };
            Arc::new(Bytes::from(elements(elem, count, &data, items)?))
        }
    };
    let mut c = match encoding {
        Encoding::Sparse => ConstData::unchecked(elem, dims, source, encoding),
        _ => match ConstData::new(elem, dims, source) {
            Ok(c) => c,
            Err(e) => return invalid(&whole, e.to_string()),
        },
    };
    c.encoding = encoding;
    c.meta = meta.unwrap_or_default();
    Ok(c)
}

fn unbound(p: Node, len: u64) -> Result<Unbound> {
    let part = inner(p.clone());
    if part.as_rule() != Rule::hex {
        return Ok(Unbound { hash: None, len });
    }
    let hash = from_hex(part.as_str()).and_then(|b| b.try_into().ok());
    match hash {
        Some(hash) => Ok(Unbound { hash: Some(hash), len }),
        None => invalid(&part, format!("expected 64 hexadecimal digits, found {}", part.as_str().len())),
    }
}

fn elements(elem: Elem, count: Option<u64>, at: &Node, items: Vec<Node>) -> Result<Vec<u8>> {
    let mut w = ElementWriter::new(elem);
    for item in items {
        if let Err(expected) = w.push(item.as_str()) {
            return invalid(&item, format!("expected {expected}, found `{}`", item.as_str()));
        }
    }
    let found = w.count();
    match w.finish() {
        Some(bytes) if count == Some(found) => Ok(bytes),
        Some(_) => {
            let count = count.map_or_else(|| "a countable number of".into(), |n| n.to_string());
            invalid(at, format!("expected {count} elements, found {found}"))
        }
        None => invalid(at, "expected a real and an imaginary part for each element"),
    }
}

/// Elements made when they are asked for, so that a short text cannot ask for much memory.
#[derive(Debug)]
struct Generated {
    elem: Elem,
    count: u64,
    len: u64,
    rule: Generator,
}

#[derive(Debug)]
enum Generator {
    /// From this seed: floats uniform in [-1, 1), integers of up to 8 bits uniform, wider ones of 4 bits.
    Random(u64),
    /// One literal for all.
    Splat(String),
}

fn generated(elem: Elem, count: u64, p: Node) -> Result<Generated> {
    let mut parts = p.clone().into_inner();
    let kind = parts.next().expect("a generator has a kind");
    let arg = parts.next().expect("a generator has an argument");
    let rule = match kind.as_str() {
        "random" => Generator::Random(number(&arg, "a seed")?),
        _ => Generator::Splat(arg.as_str().to_owned()),
    };
    let mut made = Generated { elem, count: 1, len: 0, rule };
    let (Ok(_), Some(len)) = (made.make(), elem.byte_len(count)) else {
        return invalid(&p, format!("expected something that makes elements of type {elem}"));
    };
    (made.count, made.len) = (count, len);
    Ok(made)
}

impl Generated {
    fn make(&self) -> Result<Vec<u8>, String> {
        let mut w = ElementWriter::new(self.elem);
        let parts = if matches!(self.elem, Elem::C64 | Elem::C128) { 2 } else { 1 };
        let mut state = match &self.rule {
            Generator::Random(seed) => *seed,
            Generator::Splat(_) => 0,
        };
        for _ in 0..self.count * parts {
            match &self.rule {
                Generator::Splat(text) => w.push(text)?,
                Generator::Random(_) => w.push(&random(self.elem, &mut state))?,
            }
        }
        w.finish().ok_or_else(String::new)
    }
}

/// One element literal by splitmix64 (Steele, Lea and Flood 2014).
fn random(elem: Elem, state: &mut u64) -> String {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    match elem {
        Elem::Bool => (z >> 63 == 1).to_string(),
        e if e.is_signed_int() => {
            let bits = int_bits(e);
            ((z >> (64 - bits)) as i64 - (1 << (bits - 1))).to_string()
        }
        e if e.is_int() => (z >> (64 - int_bits(e))).to_string(),
        // 24 bits: exact in every float type but the narrow ones, which round.
        _ => ((z >> 40) as f32 / (1 << 23) as f32 - 1.0).to_string(),
    }
}

fn int_bits(elem: Elem) -> usize {
    if elem.bits() > 8 { 4 } else { elem.bits() }
}

impl TensorSource for Generated {
    fn byte_len(&self) -> u64 {
        self.len
    }

    fn read(&self) -> std::result::Result<Bytes, ConstError> {
        self.make().map(Bytes::from).map_err(ConstError::Unavailable)
    }
}
