//! Files of rewrite rules (`--rules`): read, and checked before they are used.

use crate::error::Error;
use crate::files;
use dialects::ops::Ops;
use passes::eqsat::qrw::{TextRule, UserRules, check, parse};
use std::path::Path;
use std::sync::Arc;

/// Reads the rules of a file; a mistake is shown where it is.
pub fn read(path: &Path, ops: &Ops) -> Result<Vec<TextRule>, Error> {
    let bytes = files::map(path)?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|e| Error::Model(format!("{}: expected text in UTF-8: {e}", path.display())))?;
    parse::parse(text, ops).map_err(|problem| Error::Rules {
        path: path.to_owned(),
        problem,
        text: Box::new(miette::NamedSource::new(path.display().to_string(), text.to_string())),
    })
}

/// Reads the rules of some files and tries to refute each. Rules of one name may stand in one file only.
pub fn load(paths: &[impl AsRef<Path>], ops: &Ops) -> Result<UserRules, Error> {
    let mut rules: Vec<Arc<TextRule>> = Vec::new();
    for path in paths {
        let path = path.as_ref();
        for rule in read(path, ops)? {
            if rules.iter().any(|r| r.name == rule.name) {
                let message = format!("{}: another file has a rule {:?} too", path.display(), rule.name);
                return Err(Error::usage(message, "give each rule a name of its own"));
            }
            check::check(&rule, ops)
                .map_err(|refused| Error::Refused { path: path.to_owned(), refused: vec![refused] })?;
            rules.push(Arc::new(rule));
        }
    }
    Ok(UserRules(rules))
}
