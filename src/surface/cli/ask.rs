//! The one question there is: the name of what is about to change, typed.

use std::io::BufRead;

use dc_core::fail::{Exit, Fail};

use super::fails::of;
use super::out::Out;

/// Lets the caller type `word`, or takes it from its flag.
///
/// `command` is what a script would type to confirm; `prompt` stands before the cursor.
/// Errors: DC-0009 when it was typed wrong, or cannot be asked and was not given.
pub(crate) fn confirmed(
    out: &Out,
    word: &str,
    given: Option<&str>,
    prompt: &str,
    command: &str,
) -> Result<(), Fail> {
    let missing = |why: String| {
        of("DC-0009", Exit::NotConfirmed, "not confirmed; nothing was changed", why).next(command)
    };
    let typed = match given {
        Some(given) => given.to_owned(),
        None if out.asks() => {
            let _ = std::io::Write::write_all(&mut std::io::stderr(), prompt.as_bytes());
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line).map_err(|e| missing(e.to_string()))?;
            line.trim().to_owned()
        }
        None => return Err(missing("there is no terminal to ask at, and no --confirm".into())),
    };
    if typed == word {
        Ok(())
    } else {
        Err(missing(format!("{typed:?} was typed, {word:?} is what would change")))
    }
}
