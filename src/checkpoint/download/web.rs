//! Requests to the hub: who gets the token, which redirects are followed, which failures pass.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use ureq::http::{HeaderMap, Response};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::super::files::clip;
use super::super::hub::HubId;
use super::address::{host_of, join, origin, shown};
use super::{DownloadProgress, interrupted};
use crate::error::{Code, Error, Result};

const MAX_TEXT_BYTES: u64 = 32 << 20;
const MAX_REDIRECTS: usize = 8;
const ENDPOINT: &str = "https://huggingface.co";

/// How long a failing network is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Without a byte.
    pub silence: Duration,
    /// Attempts without progress.
    pub attempts: u32,
    /// Before the second attempt; doubled for each further one.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            silence: Duration::from_secs(15),
            attempts: 5,
            pause: Duration::from_millis(500),
        }
    }
}

/// A failed request.
pub(super) enum Trouble {
    /// May go away by itself.
    Passing {
        why: String,
        wait: Option<Duration>,
    },
    Final(Error),
}

impl From<Error> for Trouble {
    fn from(e: Error) -> Trouble {
        Trouble::Final(e)
    }
}

/// What a HEAD request tells of a file.
pub(super) struct Metadata {
    pub commit: Option<String>,
    pub etag: String,
    pub bytes: Option<u64>,
}

pub(super) struct Web {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    pub(super) patience: Patience,
}

impl Web {
    pub(super) fn new(env: &dyn Fn(&str) -> Option<OsString>, patience: Patience) -> Result<Web> {
        let text = |key: &str| {
            let value = env(key)?.to_string_lossy().trim().to_string();
            (!value.is_empty()).then_some(value)
        };
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_string());
        let endpoint = endpoint.trim_end_matches('/').to_string();
        let host = host_of(&endpoint).ok_or_else(|| {
            Error::new(
                Code::Usage,
                format!("HF_ENDPOINT `{}` is not an address", clip(&endpoint)),
                "it must begin with https:// or http:// and name a host",
                format!("unset it, or write it like {ENDPOINT}"),
            )
        })?;
        let mut config = Agent::config_builder()
            .user_agent(concat!("tensorpager/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(patience.silence))
            .timeout_per_read(Some(patience.silence))
            .timeout_recv_response(Some(4 * patience.silence));
        // What is on this machine needs no proxy, whatever the environment says.
        if ["127.0.0.1", "localhost", "[::1]"].contains(&host) {
            config = config.proxy(None);
        }
        let bundle = text("SSL_CERT_FILE")
            .or_else(|| text("REQUESTS_CA_BUNDLE"))
            .or_else(|| text("CURL_CA_BUNDLE"));
        if let Some(file) = bundle {
            let roots = RootCerts::new_with_certs(&certificates(&file)?);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(Web {
            agent: config.build().new_agent(),
            endpoint,
            token: token(env),
            patience,
        })
    }

    /// `path` at the hub.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.endpoint)
    }

    /// The hub answers in a way that makes no sense.
    pub(super) fn nonsense(&self, what: &str) -> Error {
        Error::new(
            Code::Hub,
            format!("{} does not answer as a model hub does", self.endpoint),
            format!("it sent {}", clip(what)),
            "try again; if HF_ENDPOINT names a mirror, try without it",
        )
    }

    /// Runs `attempt` until it succeeds, fails for good, or has failed too often.
    pub(super) fn patiently<T>(
        &self,
        cancel: &AtomicBool,
        file: &str,
        tell: &mut dyn FnMut(DownloadProgress),
        mut attempt: impl FnMut() -> std::result::Result<T, Trouble>,
    ) -> Result<T> {
        let mut failures = 0;
        loop {
            match attempt() {
                Ok(t) => return Ok(t),
                Err(Trouble::Final(e)) => return Err(e),
                Err(Trouble::Passing { why, wait }) => {
                    failures += 1;
                    self.pause(failures, &why, wait, cancel, file, tell)?;
                }
            }
        }
    }

    /// Waits before another attempt, or gives up.
    pub(super) fn pause(
        &self,
        failures: u32,
        why: &str,
        wait: Option<Duration>,
        cancel: &AtomicBool,
        file: &str,
        tell: &mut dyn FnMut(DownloadProgress),
    ) -> Result<()> {
        if failures >= self.patience.attempts {
            return Err(Error::new(
                Code::Hub,
                format!("{} cannot be downloaded from {}", clip(file), self.endpoint),
                format!("{why} ({failures} attempts)"),
                "check the network (HTTPS_PROXY and HF_ENDPOINT are honoured) and run the same command again: \
                 it goes on where it stopped",
            ));
        }
        tell(DownloadProgress::Retrying { file, why });
        let mut left = wait.unwrap_or(self.patience.pause * (1 << (failures - 1).min(6)));
        while !left.is_zero() {
            if cancel.load(Relaxed) {
                return Err(interrupted());
            }
            let nap = left.min(Duration::from_millis(50));
            std::thread::sleep(nap);
            left -= nap;
        }
        Ok(())
    }

    /// A small document.
    pub(super) fn text(
        &self,
        url: &str,
        id: &HubId,
        file: &str,
    ) -> std::result::Result<Vec<u8>, Trouble> {
        let (answer, _) = self.follow("GET", url, None, true)?;
        let mut answer = self.good(answer, id, file)?;
        let mut bytes = Vec::new();
        answer
            .body_mut()
            .as_reader()
            .take(MAX_TEXT_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| passing(e.to_string()))?;
        match bytes.len() as u64 {
            0..=MAX_TEXT_BYTES => Ok(bytes),
            _ => Err(Trouble::Final(self.nonsense("an endless document"))),
        }
    }

    /// Commit, name and size of a file. Redirects that stay at the hub are followed, those to a storage are not: the hub's
    /// own headers count.
    pub(super) fn metadata(
        &self,
        url: &str,
        id: &HubId,
        file: &str,
    ) -> std::result::Result<Metadata, Trouble> {
        let (answer, seen) = self.follow("HEAD", url, None, false)?;
        let answer = match answer.status().is_redirection() {
            true => answer,
            false => self.good(answer, id, file)?,
        };
        let last = answer.headers();
        let header = |name: &str| {
            let all = seen.iter().chain([last]);
            all.filter_map(|h| h.get(name)?.to_str().ok()).next()
        };
        let etag = header("x-linked-etag")
            .or(last.get("etag").and_then(|e| e.to_str().ok()))
            .map(|e| e.trim_start_matches("W/").trim_matches('"').to_string())
            .filter(|e| sound_etag(e))
            .ok_or_else(|| self.nonsense(&format!("no usable ETag for {}", clip(file))))?;
        // A redirect's own length says nothing about the file.
        let own = match answer.status().is_redirection() {
            true => None,
            false => last.get("content-length").and_then(|v| v.to_str().ok()),
        };
        Ok(Metadata {
            commit: header("x-repo-commit").map(str::to_string),
            bytes: header("x-linked-size").or(own).and_then(|v| v.parse().ok()),
            etag,
        })
    }

    /// The body of a file from byte `from` on, and where the answer really begins.
    pub(super) fn body(
        &self,
        url: &str,
        id: &HubId,
        file: &str,
        from: u64,
    ) -> std::result::Result<(Body, u64), Trouble> {
        let (answer, _) = self.follow("GET", url, Some(from), true)?;
        let status = answer.status().as_u16();
        if status == 416 {
            // What is here is not a part of what is there.
            return self.body(url, id, file, 0);
        }
        let answer = self.good(answer, id, file)?;
        let start = match status {
            206 => answer
                .headers()
                .get("content-range")
                .and_then(|v| {
                    v.to_str()
                        .ok()?
                        .strip_prefix("bytes ")?
                        .split('-')
                        .next()?
                        .parse()
                        .ok()
                })
                .filter(|start| *start <= from)
                .ok_or_else(|| self.nonsense("a part without saying which"))?,
            _ => 0,
        };
        Ok((answer.into_body(), start))
    }

    /// Sends a request and follows redirects, `abroad` also to other hosts. The token goes to the hub alone. Also gives the
    /// headers of the answers on the way.
    fn follow(
        &self,
        method: &str,
        url: &str,
        from: Option<u64>,
        abroad: bool,
    ) -> std::result::Result<(Response<Body>, Vec<HeaderMap>), Trouble> {
        let mut url = url.to_string();
        let mut seen = Vec::new();
        for _ in 0..MAX_REDIRECTS {
            log::debug!(
                "hub: {method} {} from byte {}",
                shown(&url),
                from.unwrap_or(0)
            );
            let mut request = match method {
                "HEAD" => self.agent.head(&url),
                _ => self.agent.get(&url),
            }
            .header("Accept-Encoding", "identity");
            if let Some(token) = self.token.as_ref().filter(|_| self.at_home(&url)) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            // From 0 the whole file: some servers answer a range without saying so.
            if let Some(from) = from.filter(|f| *f > 0) {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let answer = request.call().map_err(|e| passing(e.to_string()))?;
            let location = answer
                .headers()
                .get("location")
                .and_then(|l| l.to_str().ok());
            let (true, Some(location)) = (answer.status().is_redirection(), location) else {
                return Ok((answer, seen));
            };
            let next = join(&url, location)
                .ok_or_else(|| self.nonsense(&format!("a redirect to {}", shown(location))))?;
            if !abroad && !self.at_home(&next) {
                return Ok((answer, seen));
            }
            if url.starts_with("https://") && !next.starts_with("https://") {
                return Err(self.nonsense("a redirect away from https").into());
            }
            seen.push(answer.headers().clone());
            url = next;
        }
        Err(self.nonsense("too many redirects").into())
    }

    fn at_home(&self, url: &str) -> bool {
        origin(url).is_some() && origin(url) == origin(&self.endpoint)
    }

    /// A successful answer, or what went wrong.
    fn good(
        &self,
        answer: Response<Body>,
        id: &HubId,
        file: &str,
    ) -> std::result::Result<Response<Body>, Trouble> {
        let status = answer.status().as_u16();
        let header = |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok());
        match status {
            200..=299 => Ok(answer),
            408 | 429 | 500..=599 => Err(Trouble::Passing {
                why: format!("HTTP {status}"),
                wait: header("retry-after")
                    .and_then(|v| v.parse().ok())
                    .map(|s: u64| Duration::from_secs(s.min(60))),
            }),
            _ => {
                let code = header("x-error-code").unwrap_or_default();
                Err(Trouble::Final(self.refusal(status, code, id, file)))
            }
        }
    }

    fn refusal(&self, status: u16, code: &str, id: &HubId, file: &str) -> Error {
        let page = format!("{}/{}", self.endpoint, id.repo);
        let token = match self.token {
            Some(_) => "the token that was sent does not open it",
            None => "no token was sent",
        };
        match (status, code) {
            (_, "GatedRepo") | (403, _) => Error::new(
                Code::Hub,
                format!("model `{}` is gated", id.repo),
                format!("its authors ask who wants it, and {token} (HTTP {status})"),
                format!("accept the terms at {page}, then set HF_TOKEN to a token of that account"),
            ),
            (_, "RevisionNotFound") => Error::new(
                Code::Usage,
                format!(
                    "model `{}` has no revision `{}`",
                    id.repo,
                    clip(&id.revision)
                ),
                format!("{} says so", self.endpoint),
                format!("see {page}/tree/main for its branches and commits"),
            ),
            (404, "EntryNotFound") => Error::new(
                Code::Hub,
                format!("{} has no file {}", id.repo, clip(file)),
                format!("{} listed it and does not have it", self.endpoint),
                "try again; if HF_ENDPOINT names a mirror, try without it",
            ),
            (401 | 404, _) => Error::new(
                Code::Usage,
                format!("there is no model `{}` at {}", id.repo, self.endpoint),
                format!(
                    "there is no folder of that name either; a private model looks the same, and {token} (HTTP {status})"
                ),
                "check the spelling, or give a folder; for a private model set HF_TOKEN",
            ),
            _ => Error::new(
                Code::Hub,
                format!("{} refuses to send {}", self.endpoint, id.repo),
                format!("HTTP {status} {}", clip(code)),
                "try again later, or give a folder",
            ),
        }
    }
}

fn passing(why: String) -> Trouble {
    Trouble::Passing {
        why: clip(&why),
        wait: None,
    }
}

/// The names of blobs are made of it.
fn sound_etag(etag: &str) -> bool {
    (1..=128).contains(&etag.len())
        && etag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// `HF_TOKEN`, or what `hf auth login` stored.
fn token(env: &dyn Fn(&str) -> Option<OsString>) -> Option<String> {
    let clean = |t: String| Some(t.trim().to_string()).filter(|t| !t.is_empty() && t.is_ascii());
    let var = |key: &str| clean(env(key)?.into_string().ok()?);
    if let Some(token) = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")) {
        return Some(token);
    }
    let file = var("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| {
        let cache = || var("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || Some(PathBuf::from(var("HOME")?).join(".cache"));
        let hf = var("HF_HOME").map(PathBuf::from);
        let hf = hf.or_else(|| Some(cache().or_else(home)?.join("huggingface")));
        Some(hf?.join("token"))
    })?;
    clean(fs::read_to_string(file).ok()?)
}

/// The certificates of a bundle, for networks with an authority of their own.
fn certificates(file: &str) -> Result<Vec<Certificate<'static>>> {
    let bad = |cause: String| {
        Error::new(
            Code::Usage,
            format!("the certificates in {} cannot be used", clip(file)),
            cause,
            "let SSL_CERT_FILE (or REQUESTS_CA_BUNDLE) name a PEM file with certificates, or unset it",
        )
    };
    let pem = fs::read(file).map_err(|e| bad(e.to_string()))?;
    let found: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(c)) => Some(c),
            _ => None,
        })
        .collect();
    match found.is_empty() {
        true => Err(bad("it holds none".to_string())),
        false => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_that_could_lead_elsewhere_are_none() {
        assert!(sound_etag("0a1b-2c"));
        for bad in ["", "..", "a/b", "a.b", "a b", &"x".repeat(200)] {
            assert!(!sound_etag(bad), "{bad}");
        }
    }
}
