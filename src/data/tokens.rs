//! Rows of token ids: from a 2-D file as it stands, from a 1-D file or a text cut into windows.

use super::npy::{self, Array, NpyError};
use crate::files::{self, FileError};
use dialects::ir::Elem;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::{Path, PathBuf};
use thiserror::Error;
use tokenizers::Tokenizer;

/// Text is tokenized in pieces of about this many bytes, cut at line ends.
const PIECE: usize = 1 << 16;

/// Why a file gives no tokens.
#[derive(Debug, Error)]
pub enum TokenError {
    /// The file of an array cannot be read.
    #[error(transparent)]
    Npy(#[from] NpyError),
    /// A file cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not what is needed.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A token that the model does not have.
    #[error(
        "{}: expected token ids from 0 to {} (the rows of the model's embedding), found {id} in row {row}, column {column}",
        path.display(), vocab - 1
    )]
    OutOfRange {
        /// The file.
        path: PathBuf,
        /// The token id.
        id: i64,
        /// The row, from 0.
        row: usize,
        /// The place in the row, from 0.
        column: usize,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// The tokenizer refuses its file, or the text.
    #[error("{}: {what}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizer said.
        what: String,
    },
}

impl TokenError {
    fn unexpected(path: &Path, expected: &str, found: impl Into<String>) -> TokenError {
        TokenError::Unexpected { path: path.to_owned(), expected: expected.into(), found: found.into() }
    }
}

/// Token ids, `[rows, len]`, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// Tokens in a row.
    pub len: usize,
    ids: Vec<i64>,
}

impl Rows {
    /// Rows of `len` tokens each; `ids.len()` is a multiple of `len`.
    pub fn new(len: usize, ids: Vec<i64>) -> Rows {
        debug_assert!(len > 0 && ids.len().is_multiple_of(len));
        Rows { len, ids }
    }

    /// The number of rows.
    pub fn count(&self) -> usize {
        self.ids.len() / self.len
    }

    /// All ids, row after row.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// The ids in runs of `rows` rows, the last one shorter.
    pub fn chunks(&self, rows: usize) -> std::slice::Chunks<'_, i64> {
        self.ids.chunks(rows * self.len)
    }

    /// Refuses ids that the embedding does not have; `path` is where they come from.
    pub fn check(&self, path: &Path, vocab: Option<usize>) -> Result<(), TokenError> {
        let Some(vocab) = vocab else { return Ok(()) };
        let fits = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < vocab);
        match self.ids.iter().position(|id| !fits(id)) {
            None => Ok(()),
            Some(at) => Err(TokenError::OutOfRange {
                path: path.to_owned(),
                id: self.ids[at],
                row: at / self.len,
                column: at % self.len,
                vocab,
            }),
        }
    }
}

/// What to take from a file.
#[derive(Clone, Copy, Debug)]
pub struct Take {
    /// At most this many rows.
    pub rows: usize,
    /// At most this many tokens of each.
    pub len: usize,
    /// Rows of a 2-D file at random rather than its first ones.
    pub random: bool,
    /// Seed of what is random.
    pub seed: u64,
}

/// Reads rows from a `.npy` file: a 2-D one row by row, a 1-D one by random windows that do not overlap.
pub fn read(path: &Path, take: Take) -> Result<Rows, TokenError> {
    let array = npy::read(path)?;
    if !array.elem.is_int() || array.elem == Elem::U64 {
        return Err(TokenError::unexpected(path, "integer token ids", format!("an array of {}", array.elem)));
    }
    if array.count() == 0 {
        return Err(TokenError::unexpected(
            path,
            "token ids",
            format!("an empty array of shape {:?}", array.shape),
        ));
    }
    match array.shape[..] {
        [rows, len] => Ok(pick_rows(&array, rows, len, take)),
        [_] => {
            let all = array.tensor();
            let ids = all.to_i64().expect("an integer type was checked for");
            Ok(windows(&ids, take))
        }
        _ => Err(TokenError::unexpected(
            path,
            "a 2-D array [rows, tokens] or a 1-D array of token ids",
            format!("the shape {:?}", array.shape),
        )),
    }
}

/// What a tokenizer refuses at `path`.
fn refused(path: &Path) -> impl FnOnce(tokenizers::Error) -> TokenError + use<> {
    let path = path.to_owned();
    move |e| TokenError::Tokenizer { path, what: e.to_string() }
}

/// Reads a tokenizer from its `tokenizer.json`.
pub fn tokenizer(path: &Path) -> Result<Tokenizer, TokenError> {
    Tokenizer::from_bytes(files::map(path)?).map_err(refused(path))
}

/// Reads rows from a text: tokenized, then random windows that do not overlap.
pub fn read_text(path: &Path, tokenizer: &Path, take: Take) -> Result<Rows, TokenError> {
    let vocabulary = self::tokenizer(tokenizer)?;
    let bytes = files::map(path)?;
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        TokenError::unexpected(path, "UTF-8 text", format!("byte {} is not", e.valid_up_to()))
    })?;
    let mut ids: Vec<i64> = Vec::new();
    for piece in pieces(text) {
        let encoded = vocabulary.encode_fast(piece, false).map_err(refused(path))?;
        ids.extend(encoded.get_ids().iter().map(|&id| i64::from(id)));
    }
    if ids.is_empty() {
        return Err(TokenError::unexpected(path, "text", "nothing to tokenize"));
    }
    Ok(windows(&ids, take))
}

/// Cuts text after line ends, into pieces of at least [`PIECE`] bytes but the last.
fn pieces(text: &str) -> Vec<&str> {
    let (mut out, mut rest) = (Vec::new(), text);
    while rest.len() > PIECE {
        let Some(end) = rest.as_bytes()[PIECE..].iter().position(|&b| b == b'\n') else { break };
        let (piece, tail) = rest.split_at(PIECE + end + 1);
        out.push(piece);
        rest = tail;
    }
    out.push(rest);
    out
}

fn pick_rows(array: &Array, rows: usize, len: usize, take: Take) -> Rows {
    let mut order: Vec<usize> = (0..rows).collect();
    if take.random {
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(take.seed));
    }
    let kept = len.min(take.len);
    let mut ids = Vec::new();
    for row in order.into_iter().take(take.rows) {
        let row = array.window(row * len, &[kept]).expect("the row lies in the array");
        ids.extend_from_slice(&row.to_i64().expect("an integer type was checked for"));
    }
    Rows::new(kept, ids)
}

/// Random windows of `take.len` tokens: the ids are cut from a random start into windows side by side, of which
/// `take.rows` are drawn. Too few ids for one window make one short row.
fn windows(ids: &[i64], take: Take) -> Rows {
    let len = take.len.min(ids.len());
    let mut rng = ChaCha8Rng::seed_from_u64(take.seed);
    let start = rng.random_range(0..=ids.len() % len);
    let mut all: Vec<&[i64]> = ids[start..].chunks_exact(len).collect();
    all.shuffle(&mut rng);
    all.truncate(take.rows);
    Rows::new(len, all.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const TAKE: Take = Take { rows: 4, len: 8, random: false, seed: 0 };

    /// Writes int64 ids of this shape as numpy does.
    fn npy(dir: &Path, name: &str, shape: &[u64], ids: &[i64]) -> PathBuf {
        use npyz::WriterBuilder;
        let path = dir.join(name);
        let file = fs::File::create(&path).unwrap();
        let mut w = npyz::WriteOptions::new().default_dtype().shape(shape).writer(file).begin_nd().unwrap();
        w.extend(ids.iter().copied()).unwrap();
        w.finish().unwrap();
        path
    }

    #[test]
    fn first_rows_and_random_rows() {
        let dir = tempfile::tempdir().unwrap();
        let ids: Vec<i64> = (0..60).collect();
        let path = npy(dir.path(), "t.npy", &[6, 10], &ids);
        let rows = read(&path, Take { rows: 2, ..TAKE }).unwrap();
        assert_eq!((rows.count(), rows.len), (2, 8));
        assert_eq!(rows.ids(), [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17]);
        let random = |seed| read(&path, Take { rows: 3, len: 99, random: true, seed }).unwrap();
        assert_eq!(random(1), random(1));
        assert_ne!(random(1), random(2));
        assert!(random(1).ids().chunks(10).all(|r| r[0] % 10 == 0 && r[9] == r[0] + 9));
    }

    #[test]
    fn windows_of_a_stream_do_not_overlap() {
        let ids: Vec<i64> = (0..50).collect();
        let rows = windows(&ids, TAKE);
        assert_eq!((rows.count(), rows.len), (4, 8));
        let mut seen: Vec<i64> = rows.ids().to_vec();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 32);
        assert!(rows.ids().chunks(8).all(|r| r.windows(2).all(|w| w[1] == w[0] + 1)));
        assert_eq!(windows(&ids[..5], TAKE), Rows::new(5, vec![0, 1, 2, 3, 4]));
        assert_eq!(windows(&ids, Take { rows: 99, ..TAKE }).count(), 6);
    }

    #[test]
    fn wrong_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = |path: &Path| read(path, TAKE).unwrap_err().to_string();
        let empty = npy(dir.path(), "empty.npy", &[0, 8], &[]);
        assert!(
            error(&empty).ends_with("empty.npy: expected token ids, found an empty array of shape [0, 8]")
        );
        let deep = npy(dir.path(), "deep.npy", &[1, 2, 1], &[1, 2]);
        assert!(error(&deep).contains("expected a 2-D array") && error(&deep).contains("[1, 2, 1]"));
        let path = dir.path().join("float.npy");
        let mut w = {
            use npyz::WriterBuilder;
            let file = fs::File::create(&path).unwrap();
            npyz::WriteOptions::new().default_dtype().shape(&[1, 1]).writer(file).begin_nd().unwrap()
        };
        w.push(&1.0f32).unwrap();
        w.finish().unwrap();
        assert!(error(&path).ends_with("expected integer token ids, found an array of f32"));
        let rows = Rows::new(2, vec![0, 1, 2, 3]);
        assert!(rows.check(&path, Some(4)).is_ok() && rows.check(&path, None).is_ok());
        let error = rows.check(&path, Some(3)).unwrap_err().to_string();
        assert!(error.contains("from 0 to 2") && error.contains("found 3 in row 1, column 1"), "{error}");
        assert!(Rows::new(1, vec![-1]).check(&path, Some(3)).is_err());
    }

    #[test]
    fn text_goes_through_the_tokenizer() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models/tokenizer.json");
        let path = dir.path().join("text.txt");
        let line = "The quick brown fox jumps over the lazy dog.\n";
        fs::write(&path, line).unwrap();
        let one = read_text(&path, &tokenizer, Take { rows: 1, len: 1000, ..TAKE }).unwrap();
        assert!(one.count() == 1 && one.len > 5 && one.len < line.len());
        let text = line.repeat(3 * PIECE / line.len());
        assert_eq!(pieces(&text).concat(), text);
        assert_eq!(pieces(&text).len(), 3);
        fs::write(&path, &text).unwrap();
        let many = read_text(&path, &tokenizer, TAKE).unwrap();
        assert_eq!((many.count(), many.len), (4, 8));
        assert!(many.ids().iter().all(|id| one.ids().contains(id)));
        fs::write(&path, b"\xff\xfe").unwrap();
        assert!(read_text(&path, &tokenizer, TAKE).unwrap_err().to_string().contains("expected UTF-8 text"));
        fs::write(&path, "").unwrap();
        assert!(read_text(&path, &tokenizer, TAKE).unwrap_err().to_string().contains("nothing to tokenize"));
        assert!(read_text(&path, &path, TAKE).unwrap_err().to_string().contains("text.txt"));
    }
}
