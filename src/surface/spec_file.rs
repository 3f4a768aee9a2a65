//! A group spec as its owner wrote it: read with file and line in every complaint.

use std::ops::Range;

use dc_core::codes::Code;
use dc_core::fail::{Exit, Fail};
use dc_core::spec::{BadSpec, GroupSpec};
use toml::de::{DeTable, DeValue};

/// Largest file that is read as a spec, in bytes.
pub(crate) const SPEC_BYTES_MAX: usize = 1 << 20;

/// Reads and checks a spec; `file` is only named in complaints.
///
/// Errors: DC-0214 with the line of every fault: no TOML, unknown key, wrong type or unit,
/// and all that one spec alone can get wrong.
pub(crate) fn parse(file: &str, text: &str) -> Result<GroupSpec, Fail> {
    let refused = |why: String| {
        let what = format!("{file} is no usable group spec; nothing was changed");
        let next = format!("mend the file, then: dc-switch group apply {file} --dry-run");
        Fail::new(Code::BAD_SPEC, Exit::Refused, what, why).next(next)
    };
    if text.len() > SPEC_BYTES_MAX {
        return Err(refused(format!("it has {} bytes, at most {SPEC_BYTES_MAX} are read", text.len())));
    }
    let spec: GroupSpec = toml::from_str(text).map_err(|e| refused(at(file, text, e.span(), e.message())))?;
    spec.check().map_err(|faults| {
        let table = DeTable::parse(text).ok();
        let line = |fault: &BadSpec| {
            let span = table.as_ref().and_then(|t| span_of(t.get_ref(), &fault.key));
            at(file, text, span, &fault.to_string())
        };
        refused(faults.iter().map(line).collect::<Vec<_>>().join("\n        "))
    })?;
    Ok(spec)
}

/// Puts a complaint behind its place, as in `group.toml:12: ...`.
pub(crate) fn at(file: &str, text: &str, span: Option<Range<usize>>, complaint: &str) -> String {
    let complaint = complaint.trim().replace('\n', "; ");
    match span.and_then(|s| text.get(..s.start)) {
        Some(before) => format!("{file}:{}: {complaint}", before.matches('\n').count() + 1),
        None => format!("{file}: {complaint}"),
    }
}

/// Where the value of a dotted key stands; that of its table when the key itself is not there.
fn span_of(table: &DeTable<'_>, key: &str) -> Option<Range<usize>> {
    let (head, rest) = key.split_once('.').map_or((key, None), |(head, rest)| (head, Some(rest)));
    let (_, found) = table.iter().find(|(name, _)| name.get_ref() == head)?;
    match (rest, found.get_ref()) {
        (Some(rest), DeValue::Table(inner)) => span_of(inner, rest).or_else(|| Some(found.span())),
        _ => Some(found.span()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "name = \"orders\"\nsites = [\"rome\", \"fra\"]\n[kafka]\ntopics = [\"t\"]\nproducers = []\n\
                        consumers = []\ngroups = []\nmirror = \"m\"\n";

    fn why(text: &str) -> String {
        parse("group.toml", text).map_or_else(|fail| fail.why, |_| String::new())
    }

    #[test]
    fn a_good_file_is_read() {
        assert_eq!(why(GOOD), "");
    }

    #[test]
    fn the_example_is_a_group_with_every_plane() {
        let text = include_str!("../../deploy/lab/example/group.toml");
        assert_eq!(why(text), "");
        assert_eq!(parse("group.toml", text).map(|spec| spec.planes().len()).unwrap_or_default(), 4);
    }

    #[test]
    fn complaints_name_file_and_line() {
        let unknown = why(&GOOD.replace("mirror =", "miror = \"x\"\nmirror ="));
        assert!(unknown.starts_with("group.toml:8: ") && unknown.contains("miror"), "{unknown}");
        let unit = why(&format!("{GOOD}[policy]\ndrain_limit = \"30\"\n"));
        assert!(unit.starts_with("group.toml:10: ") && unit.contains("60s"), "{unit}");
        let twice = why(&GOOD.replace("[\"rome\", \"fra\"]", "[\"rome\", \"rome\"]"));
        assert!(twice.starts_with("group.toml:2: ") && twice.contains("twice"), "{twice}");
        let number = why(&format!("{GOOD}[policy]\nlag_bytes_max = -1\n"));
        assert!(number.starts_with("group.toml:10: "), "{number}");
    }

    #[test]
    fn all_faults_are_told_at_once() {
        let both = why(&GOOD
            .replace("[\"rome\", \"fra\"]", "[\"rome\"]")
            .replace("topics = [\"t\"]", "topics = []"));
        assert!(
            both.contains("group.toml:2: sites") && both.contains("group.toml:4: kafka.topics"),
            "{both}"
        );
    }
}
