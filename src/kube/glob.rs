//! Patterns of files: `*` stands for any characters of the last component.

/// A pattern cut into its directory ("" where it has none) and the pattern of the name.
#[must_use]
pub(super) fn split(pattern: &str) -> (&str, &str) {
    match pattern.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((directory, name)) => (directory, name),
        None => ("", pattern),
    }
}

/// Whether a file's name fits. As in a shell, hidden files fit only a pattern that begins with a dot: editors and
/// copying tools keep unfinished files under such names.
#[must_use]
pub(super) fn fits(pattern: &str, name: &str) -> bool {
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(head) else { return false };
    let mut parts = rest.split('*').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return name.ends_with(part);
        }
        let Some(at) = name.find(part) else { return false };
        name = &name[at + part.len()..];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_fit() {
        for (pattern, name, expected) in [
            ("*.json", "a.json", true),
            ("*.json", ".json", false),
            ("*.json", ".a.json", false),
            (".*", ".a.json", true),
            ("*.json", "a.json~", false),
            ("a.json", "a.json", true),
            ("a.json", "b.json", false),
            ("a*b*c", "abc", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "ac", false),
            ("a*a", "a", false),
            ("a*ab", "ab", false),
            ("*", "anything", true),
            ("**", "", true),
            ("*b*", "ab", true),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
        for (pattern, parts) in [("a/b/*", ("a/b", "*")), ("/x", ("/", "x")), ("x*", ("", "x*"))] {
            assert_eq!(split(pattern), parts);
        }
    }
}
