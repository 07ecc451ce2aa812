//! `{% generation %}` and `{% endgeneration %}`, which mark what an assistant said for training.

/// Makes the marks blocks that do nothing; white space around them is controlled as before.
pub(super) fn without_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        let inside = tag.strip_prefix(['-', '+']).unwrap_or(tag);
        let name = inside.trim_start();
        let mark = [("generation", "with"), ("endgeneration", "endwith")].into_iter().find_map(|(mark, instead)| {
            let after = name.strip_prefix(mark)?;
            let end = after.trim_start();
            ["%}", "-%}", "+%}"].iter().any(|close| end.starts_with(close)).then_some((instead, after))
        });
        rest = match mark {
            Some((instead, after)) => {
                out.push_str(&tag[..tag.len() - name.len()]);
                out.push_str(instead);
                after
            }
            None => tag,
        };
    }
    out.push_str(rest);
    out
}
