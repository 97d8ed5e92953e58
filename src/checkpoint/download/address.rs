//! Addresses of the web, taken apart and joined.

/// `scheme://host:port`.
pub(super) fn origin(url: &str) -> Option<&str> {
    let start = url.find("://")? + 3;
    let scheme = &url[..start];
    let end = url[start..]
        .find(['/', '?', '#'])
        .map_or(url.len(), |i| start + i);
    (matches!(scheme, "https://" | "http://") && end > start).then(|| &url[..end])
}

pub(super) fn host_of(url: &str) -> Option<&str> {
    let authority = &origin(url)?[url.find("://")? + 3..];
    let colon = authority
        .rfind(':')
        .filter(|c| !authority[*c..].contains(']'));
    Some(&authority[..colon.unwrap_or(authority.len())]).filter(|h| !h.is_empty())
}

pub(super) fn join(base: &str, location: &str) -> Option<String> {
    if origin(location).is_some() {
        Some(location.to_string())
    } else if let Some(rest) = location.strip_prefix("//") {
        Some(format!("{}://{rest}", base.split("://").next()?))
    } else {
        location
            .starts_with('/')
            .then(|| Some(format!("{}{location}", origin(base)?)))?
    }
}

/// An address for people: without the signature that may follow.
pub(super) fn shown(url: &str) -> &str {
    url.split('?').next().unwrap_or(url)
}

/// A name as a path of an address writes it.
pub(super) fn escape(path: &str) -> String {
    let keep = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    path.bytes()
        .map(|b| match keep(b) {
            true => (b as char).to_string(),
            false => format!("%{b:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart_and_joined() {
        assert_eq!(origin("https://h.co/a?b"), Some("https://h.co"));
        assert_eq!(origin("http://127.0.0.1:80"), Some("http://127.0.0.1:80"));
        for none in ["", "h.co", "ftp://h.co", "https://", "https:///x"] {
            assert_eq!(origin(none), None, "{none}");
        }
        assert_eq!(host_of("http://[::1]:80/x"), Some("[::1]"));
        assert_eq!(host_of("http://localhost:8080"), Some("localhost"));
        let base = "https://h.co/a/b";
        assert_eq!(join(base, "/x?y").as_deref(), Some("https://h.co/x?y"));
        assert_eq!(join(base, "//cdn/x").as_deref(), Some("https://cdn/x"));
        assert_eq!(join(base, "http://o/x").as_deref(), Some("http://o/x"));
        assert_eq!(join(base, "x"), None);
        assert_eq!(escape("a/b c#d?"), "a/b%20c%23d%3F");
    }
}
