//! Methods of Python's strings that templates call, beyond those that minijinja-contrib has.

use minijinja::value::from_args;
use minijinja::{Error, ErrorKind, State, Value};

/// Calls `method` on `value`. Methods of dicts, lists and the other ones of strings are minijinja-contrib's.
pub(super) fn call(state: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = on_string(state, text, method, args)
    {
        return result;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// `None` if it is another method.
fn on_string(state: &State<'_, '_>, text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match method {
        "rsplit" => from_args(args).and_then(|(separator, most): (Option<&str>, Option<i64>)| {
            separator.map_or(Ok(()), not_empty)?;
            // A negative number of splits is no limit.
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            Ok(rsplit(text, separator, most).into_iter().map(Value::from).collect())
        }),
        "partition" | "rpartition" => one(args).and_then(|separator| {
            not_empty(separator)?;
            let (found, otherwise) = match method {
                "partition" => (text.split_once(separator), [text, "", ""]),
                _ => (text.rsplit_once(separator), ["", "", text]),
            };
            let parts = found.map_or(otherwise, |(before, after)| [before, separator, after]);
            Ok(parts.into_iter().map(Value::from).collect())
        }),
        "removeprefix" => one(args).map(|prefix| Value::from(text.strip_prefix(prefix).unwrap_or(text))),
        "removesuffix" => one(args).map(|suffix| Value::from(text.strip_suffix(suffix).unwrap_or(text))),
        "index" | "rindex" => one(args).and_then(|part| {
            let at = if method == "index" { text.find(part) } else { text.rfind(part) };
            let missing = || Error::new(ErrorKind::InvalidOperation, "substring not found");
            Ok(Value::from(text[..at.ok_or_else(missing)?].chars().count()))
        }),
        "zfill" => from_args(args).and_then(|(width,): (usize,)| {
            let zeros = width.saturating_sub(text.chars().count());
            // A width is quickly written, its zeros are memory.
            state.consume_fuel(zeros as u64 / 64)?;
            let sign = text.len() - text.strip_prefix(['+', '-']).unwrap_or(text).len();
            Ok(Value::from([&text[..sign], &"0".repeat(zeros), &text[sign..]].concat()))
        }),
        // The letters whose folded form is not their lower case, as far as they occur in living languages.
        "casefold" => from_args(args).map(|()| Value::from(text.to_lowercase().replace('ß', "ss").replace('ς', "σ"))),
        _ => return None,
    })
}

fn one(args: &[Value]) -> Result<&str, Error> {
    from_args(args).map(|(argument,): (&str,)| argument)
}

fn not_empty(separator: &str) -> Result<(), Error> {
    if separator.is_empty() { Err(Error::new(ErrorKind::InvalidOperation, "empty separator")) } else { Ok(()) }
}

/// Splits from the right, at most `most` times; without a separator at white space.
fn rsplit<'t>(text: &'t str, separator: Option<&str>, most: usize) -> Vec<&'t str> {
    let mut parts = Vec::new();
    let mut rest = if separator.is_some() { text } else { text.trim() };
    while parts.len() < most {
        let cut = match separator {
            Some(separator) => rest.rsplit_once(separator),
            None => rest.rsplit_once(char::is_whitespace).map(|(before, word)| (before.trim_end(), word)),
        };
        let Some((before, part)) = cut else { break };
        parts.push(part);
        rest = before;
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest);
    }
    parts.reverse();
    parts
}
