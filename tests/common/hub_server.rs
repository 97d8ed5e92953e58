//! A hub on 127.0.0.1 that speaks the protocol of huggingface.co as its clients see it: a list of files, HEAD and GET of
//! `resolve` with redirects to a storage at another address, ETags, ranges; and fails as networks do, on request.
#![allow(dead_code)] // each user takes a part

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong with one file's bytes, once each.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// The connection ends after so many bytes.
    Drop(usize),
    /// One bit of the answer is another.
    Flip,
    /// A range is answered with the whole.
    IgnoreRange,
    Status(u16),
    /// Nothing comes for so many milliseconds, then the connection ends.
    Silence(u64),
}

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub range: Option<u64>,
    pub token: Option<String>,
    pub storage: bool,
}

#[derive(Default)]
pub struct State {
    /// Name → bytes.
    pub files: BTreeMap<String, Vec<u8>>,
    pub faults: BTreeMap<String, Vec<Fault>>,
    pub seen: Vec<Request>,
    /// Answer to everything of the model: status and X-Error-Code.
    pub refuse: Option<(u16, &'static str)>,
    /// The same for `resolve` alone, as gated models have it.
    pub refuse_files: Option<(u16, &'static str)>,
    /// Sizes and ETags said instead of the true ones.
    pub sizes: BTreeMap<String, u64>,
    pub etags: BTreeMap<String, String>,
    /// The commit that `resolve` claims.
    pub commit: Option<String>,
}

pub struct Server {
    pub state: Arc<Mutex<State>>,
    pub address: String,
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// git's id of a file.
pub fn git(bytes: &[u8]) -> String {
    let mut sha = Sha1::new();
    sha.update(format!("blob {}\0", bytes.len()));
    sha.update(bytes);
    hex(&sha.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Large files lie in the storage, as on the hub.
fn large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".bin")
}

pub fn etag(name: &str, bytes: &[u8]) -> String {
    match large(name) {
        true => sha256(bytes),
        false => git(bytes),
    }
}

impl Server {
    pub fn start(files: &[(&str, &[u8])]) -> Server {
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let storage = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", hub.local_addr().unwrap());
        let elsewhere = format!("http://{}", storage.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State {
            files: files
                .iter()
                .map(|(n, b)| (n.to_string(), b.to_vec()))
                .collect(),
            ..State::default()
        }));
        for (listener, is_storage) in [(hub, false), (storage, true)] {
            let (state, elsewhere) = (state.clone(), elsewhere.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (state, elsewhere) = (state.clone(), elsewhere.clone());
                    std::thread::spawn(move || {
                        let _ = serve(stream, &state, &elsewhere, is_storage);
                    });
                }
            });
        }
        Server { state, address }
    }

    /// With the files of a folder.
    pub fn of_folder(dir: &std::path::Path) -> Server {
        let server = Server::start(&[]);
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            if path.is_file() {
                server.put(&name, std::fs::read(path).unwrap());
            }
        }
        server
    }

    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        self.state
            .lock()
            .unwrap()
            .files
            .insert(name.to_string(), bytes);
    }

    pub fn fault(&self, name: &str, faults: &[Fault]) {
        let mut state = self.state.lock().unwrap();
        state.faults.insert(name.to_string(), faults.to_vec());
    }

    pub fn change(&self, how: impl FnOnce(&mut State)) {
        how(&mut self.state.lock().unwrap());
    }

    /// Says another size than the true one, everywhere.
    pub fn say_size(&self, name: &str, bytes: u64) {
        self.change(|s| {
            s.sizes.insert(name.to_string(), bytes);
        });
    }

    pub fn seen(&self) -> Vec<Request> {
        self.state.lock().unwrap().seen.clone()
    }

    /// Where the GETs of a file's bytes began.
    pub fn ranges(&self, name: &str) -> Vec<u64> {
        let of_bytes = |r: &Request| {
            let path = r.path.split('?').next().unwrap_or_default();
            let bytes = r.storage || path.contains("/resolve-cache/");
            r.method == "GET" && bytes && path.ends_with(name)
        };
        let gets = self.seen().into_iter().filter(of_bytes);
        gets.map(|r| r.range.unwrap_or(0)).collect()
    }
}

fn read_request(stream: &TcpStream, storage: bool) -> std::io::Result<Request> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let mut request = Request {
        method: words.next().unwrap_or_default().to_string(),
        path: words.next().unwrap_or_default().to_string(),
        range: None,
        token: None,
        storage,
    };
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(request);
        }
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let start = value.trim().strip_prefix("bytes=").unwrap_or_default();
                request.range = start.trim_end_matches('-').parse().ok();
            }
            "authorization" => request.token = Some(value.trim().to_string()),
            _ => {}
        }
    }
}

fn serve(
    mut stream: TcpStream,
    state: &Mutex<State>,
    elsewhere: &str,
    storage: bool,
) -> std::io::Result<()> {
    let request = read_request(&stream, storage)?;
    let mut state = state.lock().unwrap();
    state.seen.push(request.clone());
    let path = request.path.split('?').next().unwrap_or_default();
    if storage {
        let name = path.rsplit("/blob/").next().unwrap().to_string();
        return send_file(stream, &request, state, &name, "");
    }
    let refusal = state.refuse.or_else(|| {
        let file = path.contains("/resolve/");
        state.refuse_files.filter(|_| file)
    });
    if let Some((status, code)) = refusal {
        let more = format!("X-Error-Code: {code}\r\n");
        return head(&mut stream, status, 0, &more);
    }
    if path.starts_with("/api/models/") {
        let body = listing(&state).to_string();
        head(&mut stream, 200, body.len() as u64, "")?;
        return stream.write_all(body.as_bytes());
    }
    if let Some((_, rest)) = path.split_once("/resolve-cache/") {
        let name = rest.to_string();
        let said = said_etag(&state, &name);
        return send_file(
            stream,
            &request,
            state,
            &name,
            &format!("ETag: \"{said}\"\r\n"),
        );
    }
    let Some((_, rest)) = path.split_once("/resolve/") else {
        return head(&mut stream, 404, 0, "X-Error-Code: RepoNotFound\r\n");
    };
    let name = rest
        .split_once('/')
        .map_or("", |(_, name)| name)
        .to_string();
    if !state.files.contains_key(&name) {
        return head(&mut stream, 404, 0, "X-Error-Code: EntryNotFound\r\n");
    }
    let commit = state.commit.clone().unwrap_or_else(|| COMMIT.to_string());
    let mut more = format!("X-Repo-Commit: {commit}\r\n");
    if large(&name) {
        more += &format!(
            "X-Linked-ETag: \"{}\"\r\nX-Linked-Size: {}\r\nLocation: {elsewhere}/blob/{name}?sig=abc\r\n",
            said_etag(&state, &name),
            said_size(&state, &name)
        );
        return head(&mut stream, 302, 0, &more);
    }
    more += &format!("Location: /resolve-cache/{name}\r\n");
    head(&mut stream, 307, 0, &more)
}

fn said_etag(state: &State, name: &str) -> String {
    let known = state.etags.get(name).cloned();
    known.unwrap_or_else(|| etag(name, &state.files[name]))
}

fn said_size(state: &State, name: &str) -> u64 {
    let known = state.sizes.get(name).copied();
    known.unwrap_or(state.files[name].len() as u64)
}

fn listing(state: &State) -> Value {
    let siblings: Vec<Value> = state
        .files
        .iter()
        .map(|(name, bytes)| {
            let mut s =
                json!({"rfilename": name, "size": said_size(state, name), "blobId": git(bytes)});
            if large(name) {
                s["lfs"] =
                    json!({"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 130});
            }
            s
        })
        .collect();
    json!({"_id": "1", "id": "org/tiny", "sha": COMMIT, "private": false, "gated": false, "siblings": siblings})
}

fn send_file(
    mut stream: TcpStream,
    request: &Request,
    mut state: std::sync::MutexGuard<State>,
    name: &str,
    more: &str,
) -> std::io::Result<()> {
    let Some(mut bytes) = state.files.get(name).cloned() else {
        return head(&mut stream, 404, 0, "");
    };
    let size = said_size(&state, name);
    let fault = match state.faults.get_mut(name) {
        Some(list) if request.method == "GET" && !list.is_empty() => Some(list.remove(0)),
        _ => None,
    };
    drop(state);
    if request.method == "HEAD" {
        return head(&mut stream, 200, size, more);
    }
    let mut from = request.range.unwrap_or(0) as usize;
    match fault {
        Some(Fault::Status(status)) => return head(&mut stream, status, 0, ""),
        Some(Fault::IgnoreRange) => from = 0,
        Some(Fault::Flip) => {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        Some(Fault::Silence(ms)) => {
            std::thread::sleep(std::time::Duration::from_millis(ms));
            return stream.shutdown(Shutdown::Both);
        }
        _ => {}
    }
    if from > bytes.len() {
        return head(&mut stream, 416, 0, "");
    }
    let part = &bytes[from..];
    let (status, range) = match from {
        0 => (200, String::new()),
        _ => {
            let last = bytes.len() - 1;
            let total = bytes.len();
            (
                206,
                format!("Content-Range: bytes {from}-{last}/{total}\r\n"),
            )
        }
    };
    head(
        &mut stream,
        status,
        part.len() as u64,
        &format!("{more}{range}"),
    )?;
    match fault {
        Some(Fault::Drop(after)) => stream.write_all(&part[..after.min(part.len())])?,
        _ => stream.write_all(part)?,
    }
    stream.flush()?;
    stream.shutdown(Shutdown::Both)
}

fn head(stream: &mut TcpStream, status: u16, length: u64, more: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n"
    )
}
