use super::*;
use crate::checkpoint::OpenOptions;

pub(super) fn fixture(name: &str) -> Checkpoint {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let path = root.join(name).display().to_string();
    Checkpoint::open(&path, &OpenOptions::default()).unwrap()
}

pub(super) fn outlined(name: &str) -> Outline {
    outline(
        &fixture(name),
        &DtypePolicy::Auto,
        Path::new("/nowhere"),
        false,
    )
    .unwrap()
}

/// A process of 20 MB on a machine with 8 GiB free.
pub(super) fn host() -> HostMemory {
    HostMemory {
        available: 8 << 30,
        peak: 20_000_000,
        resident: 20_000_000,
    }
}

pub(super) fn options(device: DeviceChoice) -> EngineOptions {
    EngineOptions {
        device,
        page_bytes: Some(64 << 10),
        context: 2048,
        max_sequences: 64,
        logits_rows: 64,
        ..EngineOptions::default()
    }
}

/// The budget that stands before `are enough` behind `what`.
fn enough(fix: &str, what: &str) -> u64 {
    let behind = fix.split(what).nth(1).unwrap_or_else(|| panic!("{fix}"));
    let words = behind.split(" are enough").next().unwrap();
    crate::units::parse_size(words.rsplit(' ').next().unwrap()).unwrap()
}

#[test]
fn a_gpu_that_is_too_small_is_told_what_would_fit() {
    let outline = outlined("gpu-qwen2-bf16");
    let weights = Weights::from(&outline);
    let options = options(DeviceChoice::Cuda(0));
    let room = |limit| GpuRoom {
        limit,
        base: 8 << 20,
    };
    let advisor = |limit, options: &EngineOptions| {
        Advisor::new(&weights, options, host()).with_gpu(Some(room(limit)))
    };
    let short = advisor(16 << 20, &options);
    let error = short.fitted(&short.asked(), ENDLESS).unwrap_err();
    assert_eq!(error.code(), Code::Memory);
    let told = short.too_little(error);
    let fix = told.fix();
    assert!(fix.contains("--gpu-memory"), "{fix}");
    let halved = EngineOptions {
        max_sequences: 32,
        logits_rows: 32,
        ..options.clone()
    };
    let shorter = EngineOptions {
        context: 256,
        ..options.clone()
    };
    for (what, changed) in [
        ("with 32 sequences at once ", halved),
        ("with --context 256 ", shorter),
    ] {
        let named = enough(fix, what);
        let with = |limit| {
            let asked = advisor(limit, &changed);
            let fitted = asked.fitted(&asked.asked(), asked.budget());
            fitted.is_ok()
        };
        assert!(with(named), "{fix}");
        assert!(!with(named - STARTS_DIFFER - (2 << 20)), "{fix}");
    }
    // Where the host is what is short, its memory is what is spoken of.
    let little = EngineOptions {
        cpu_memory: Some(30 << 20),
        ..options.clone()
    };
    let short = advisor(8 << 30, &little);
    assert!(matches!(short.short(), Short::Host));
    let error = short.fitted(&short.asked(), 30 << 20).unwrap_err();
    let told = short.too_little(error);
    assert!(told.fix().contains("this machine has "), "{told}");
    // A GPU that could not be asked: what the engine said stands.
    let unknown = Advisor::new(&weights, &options, host());
    assert_eq!(unknown.too_little(told.clone()), told);
}

#[test]
fn only_weights_of_32_bits_are_halved() {
    let folder = Path::new("/nowhere");
    let whole = outlined("llama-f32");
    let half = in_16_bits(&fixture("llama-f32"), whole.dtype, folder).unwrap();
    assert_eq!(half.dtype, DtypeLabel::Uniform(Dtype::BF16));
    assert!(half.pack_bytes < whole.pack_bytes);
    let bf16 = outlined("qwen2-bf16");
    assert!(in_16_bits(&fixture("qwen2-bf16"), bf16.dtype, folder).is_none());
}

fn no_space(error: Error, folder: &Path) -> Error {
    let space = NoSpace {
        offload_folder: folder,
        needed: 3_000_000,
        half: None,
        casts: false,
    };
    space.explain(error)
}

#[test]
fn no_space_says_what_cleaning_would_give_back() {
    let dir = tempfile::tempdir().unwrap();
    let error = || Error::new(Code::Space, "not enough", "x", "y");
    let none = no_space(error(), dir.path());
    assert!(none.fix().contains("nothing there is stale"), "{none}");
    // A pack whose manifest is cut off.
    let cut = dir.path().join("model--bf16");
    std::fs::create_dir(&cut).unwrap();
    std::fs::write(cut.join("layer.000.dat"), vec![0; 20_000]).unwrap();
    let manifest = r#"{"format": "tensorpager", "version": 1}"#;
    std::fs::write(cut.join("manifest.json"), manifest).unwrap();
    let some = no_space(error(), dir.path());
    // How much is the file system's to say: it counts whole blocks.
    assert!(some.fix().contains("clean --stale` would free 2"), "{some}");
    assert!(some.fix().contains("--in-place"), "{some}");
    let limit = Error::new(Code::Space, "a", "b", "raise --offload-limit to 2 GB");
    assert_eq!(no_space(limit.clone(), dir.path()), limit);
    let other = Error::new(Code::Io, "a", "b", "c");
    assert_eq!(no_space(other.clone(), dir.path()), other);
    // No disk has this; half of it fits nowhere either.
    let endless = NoSpace {
        offload_folder: dir.path(),
        needed: u64::MAX,
        half: Some(u64::MAX / 2),
        casts: true,
    };
    let told = endless.explain(error());
    let fix = told.fix();
    assert!(fix.contains("no other local disk"), "{fix}");
    assert!(
        fix.contains("--dtype bfloat16 needs ") && !fix.contains("which fits"),
        "{fix}"
    );
    assert!(!fix.contains("--in-place"), "{fix}");
}
