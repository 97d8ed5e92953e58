use super::*;

fn sample() -> Manifest {
    Manifest {
        format: FORMAT.to_string(),
        version: FORMAT_VERSION,
        model: "tiny".to_string(),
        model_type: "qwen2".to_string(),
        dtype: "bfloat16".to_string(),
        align_bytes: ALIGN_BYTES,
        block_bytes: BLOCK_BYTES,
        spec: serde_json::json!({"hidden_size": 8, "rms_norm_eps": 1e-6}),
        source: SourceRecord {
            path: "/models/tiny".to_string(),
            revision: Some("c0ffee".to_string()),
            config_xxh3: 3,
            identity: u64::MAX,
            files: vec![SourceFileRecord {
                name: "model.safetensors".to_string(),
                bytes: 10,
                header_xxh3: 1 << 63,
                mtime_ns: -1,
            }],
        },
        copies: vec![CopyRecord::of("config.json", b"{}")],
        files: vec![FileRecord {
            name: "embed.dat".to_string(),
            bytes: 4096,
        }],
        checksums: CopyRecord::of(CHECKSUMS, b"12345678"),
        units: Vec::new(),
    }
}

fn read(text: &str) -> Result<Manifest> {
    Manifest::from_text(Path::new("pack"), text)
}

#[test]
fn text_and_back() {
    let text = sample().to_text().unwrap();
    assert_eq!(read(&text).unwrap(), sample());
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["source"]["identity"], "ffffffffffffffff");
    assert_eq!(value["version"], 1);
}

// hazard: manifest: torn or edited: no manifest, packed again
#[test]
fn every_changed_byte_and_every_cut_is_refused() {
    let text = sample().to_text().unwrap();
    for at in 0..text.len() {
        let mut bad = text.clone().into_bytes();
        bad[at] ^= 1;
        let bad = String::from_utf8(bad).unwrap();
        assert!(read(&bad).is_err(), "byte {at}: {bad}");
        assert!(read(&text[..at]).is_err(), "cut at {at}");
    }
    assert!(read(&format!("{text} ")).is_err());
    assert!(read("é".repeat(40).as_str()).is_err());
}

/// What a stranger can write: any fields, with the right hash on top.
fn forged(change: impl Fn(&mut Value)) -> Result<Manifest> {
    let mut value = serde_json::to_value(sample()).unwrap();
    change(&mut value);
    let text = serde_json::to_string_pretty(&value).unwrap();
    let body = text.strip_prefix("{\n").unwrap();
    read(&format!(
        "{{\n  \"xxh3\": \"{:016x}\",\n{body}",
        hash_bytes(body.as_bytes())
    ))
}

// hazard: manifest: unknown version, kind or encoding: refused
#[test]
fn versions_formats_and_fields_unknown_are_refused() {
    assert!(forged(|_| {}).is_ok());
    let error = forged(|v| v["version"] = 2.into()).unwrap_err();
    assert!(
        error.what().contains("another version") && error.cause().contains("version 2"),
        "{error}"
    );
    assert!(forged(|v| v["format"] = "gguf".into()).is_err());
    assert!(forged(|v| v["extra"] = 1.into()).is_err());
    assert!(forged(|v| v["source"]["identity"] = "xyz".into()).is_err());
    assert!(forged(|v| v["source"]["identity"] = 5.into()).is_err());
    assert!(forged(|v| v["files"][0]["bytes"] = (-1).into()).is_err());
    assert!(forged(|v| v["files"][0]["bytes"] = 1e300.into()).is_err());
    assert!(forged(|v| v["units"] = Value::Null).is_err());
}

#[test]
fn large_and_strange_files_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Manifest::load(dir.path()).unwrap().is_none());
    assert_eq!(claims(dir.path()), None);
    let path = dir.path().join(MANIFEST);
    let file = fs::File::create(&path).unwrap();
    file.set_len(MAX_MANIFEST_BYTES + 1).unwrap();
    assert_eq!(Manifest::load(dir.path()).unwrap_err().code(), Code::Store);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert_eq!(Manifest::load(dir.path()).unwrap_err().code(), Code::Store);
    fs::remove_file(&path).unwrap();
    fs::write(&path, [0xff, 0xfe]).unwrap();
    assert_eq!(Manifest::load(dir.path()).unwrap_err().code(), Code::Store);
    sample().save(dir.path()).unwrap();
    assert_eq!(Manifest::load(dir.path()).unwrap().unwrap(), sample());
    assert_eq!(claims(dir.path()), Some(1));
    assert!(!dir.path().join("manifest.json.tmp").exists());
}
