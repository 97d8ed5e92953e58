//! safetensors headers: one mutation of a sound file is refused, whatever it is.

use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::checkpoint::header::{self, Stored};
use crate::checkpoint::testing::{self, Tensor};
use crate::error::{Code, Result};
use crate::units::Dtype;

fn sample() -> Vec<Tensor> {
    let tensor = |name: &str, dtype, shape: &[usize], bytes| Tensor {
        name: name.to_string(),
        dtype,
        shape: shape.to_vec(),
        data: vec![7; bytes],
    };
    vec![
        tensor("a.weight", "BF16", &[3, 5], 30),
        tensor("b.bias", "F32", &[], 4),
        tensor("c", "I64", &[2], 16),
        tensor("d", "F16", &[0, 9], 0),
        tensor("e", "F8_E4M3", &[5], 5),
    ]
}

const DATA_BYTES: u64 = 55;

fn read(bytes: &[u8]) -> Result<header::Header> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    let file = fs::File::open(&path).unwrap();
    header::read(&file, &path, bytes.len() as u64)
}

fn header_value() -> Value {
    serde_json::from_str(&testing::header_json(&sample())).unwrap()
}

#[test]
fn a_sound_header_reads() {
    let bytes = testing::safetensors(&sample());
    let header = read(&bytes).unwrap();
    assert_eq!(header.data_offset, bytes.len() as u64 - DATA_BYTES);
    assert_eq!(header.tensors.len(), 5);
    let find = |name: &str| header.tensors.iter().find(|t| t.name == name).unwrap();
    assert_eq!(find("a.weight").dtype, Stored::Ours(Dtype::BF16));
    assert_eq!((find("b.bias").begin, find("b.bias").end), (30, 34));
    assert_eq!(find("c").dtype, Stored::Other("I64".to_string()));
    assert_eq!(find("d").shape, [0, 9]);
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    assert_eq!(
        read(&other).unwrap().hash,
        header.hash,
        "the hash is of the header alone"
    );
}

/// Every single change of a sound header, each of a kind that some writer or attacker made.
fn mutations() -> Vec<(&'static str, Vec<u8>)> {
    let data = vec![7u8; DATA_BYTES as usize];
    let sound = testing::safetensors(&sample());
    let json = testing::header_json(&sample());
    let assemble = |text: &str| testing::assemble(text.as_bytes(), &data);
    let edited = |f: &dyn Fn(&mut Value)| {
        let mut value = header_value();
        f(&mut value);
        assemble(&value.to_string())
    };
    let field = |name: &'static str, key: &'static str, to: Value| {
        edited(&move |v| v[name][key] = to.clone())
    };
    let length = |n: u64| [&n.to_le_bytes()[..], &sound[8..]].concat();
    let renamed = |to: &str| assemble(&json.replacen("\"c\"", &format!("\"{to}\""), 1));
    vec![
        ("empty file", vec![]),
        ("seven bytes", vec![0; 7]),
        ("length only", 0u64.to_le_bytes().to_vec()),
        ("length zero", length(0)),
        ("length one", length(1)),
        ("length short by one", length(json.len() as u64 - 3)),
        ("length long by one", length(json.len() as u64 + 1)),
        ("length beyond the file", length(sound.len() as u64)),
        (
            "length above the limit",
            length(header::MAX_HEADER_BYTES + 1),
        ),
        ("length all ones", length(u64::MAX)),
        (
            "length that overflows with the 8 before it",
            length(u64::MAX - 7),
        ),
        ("truncated in the header", sound[..40].to_vec()),
        ("truncated by one byte", sound[..sound.len() - 1].to_vec()),
        ("one trailing byte", [&sound[..], &[0]].concat()),
        ("white space in front", assemble(&format!(" {json}"))),
        ("not an object", assemble("[]")),
        (
            "no closing brace",
            assemble(json.trim_end().strip_suffix('}').unwrap()),
        ),
        ("something behind the brace", assemble(&format!("{json}x"))),
        ("two objects", assemble(&format!("{json}{json}"))),
        (
            "not UTF-8",
            testing::assemble(&[json.as_bytes(), b"\xff"].concat(), &data),
        ),
        ("a trailing comma", assemble(&json.replacen("]}", "],}", 1))),
        (
            "duplicate tensor",
            assemble(&json.replacen("\"d\"", "\"c\"", 1)),
        ),
        (
            "duplicate tensor by escape",
            assemble(&json.replacen("\"d\"", "\"\\u0063\"", 1)),
        ),
        (
            "duplicate field",
            assemble(&json.replacen("\"dtype\"", "\"shape\":[3,5],\"dtype\"", 1)),
        ),
        (
            "duplicate metadata",
            assemble(&json.replacen('{', "{\"__metadata__\":{},", 1)),
        ),
        (
            "metadata is a list",
            edited(&|v| v["__metadata__"] = json!([])),
        ),
        ("unknown field", field("c", "strides", json!([1]))),
        (
            "no dtype",
            edited(&|v| drop(v["c"].as_object_mut().unwrap().shift_remove("dtype"))),
        ),
        (
            "no shape",
            edited(&|v| drop(v["c"].as_object_mut().unwrap().shift_remove("shape"))),
        ),
        (
            "no offsets",
            edited(&|v| drop(v["c"].as_object_mut().unwrap().shift_remove("data_offsets"))),
        ),
        ("tensor is null", edited(&|v| v["c"] = Value::Null)),
        ("one offset", field("c", "data_offsets", json!([34]))),
        (
            "three offsets",
            field("c", "data_offsets", json!([34, 50, 50])),
        ),
        (
            "offsets swapped",
            field("c", "data_offsets", json!([50, 34])),
        ),
        (
            "negative offset",
            field("c", "data_offsets", json!([-34, 50])),
        ),
        (
            "fractional offset",
            field("c", "data_offsets", json!([34.0, 50])),
        ),
        (
            "offset as text",
            field("c", "data_offsets", json!(["34", 50])),
        ),
        (
            "offsets overlap",
            field("c", "data_offsets", json!([33, 49])),
        ),
        (
            "two tensors in one place",
            edited(&|v| v["f"] = v["c"].clone()),
        ),
        ("a hole", field("c", "data_offsets", json!([35, 51]))),
        (
            "offsets beyond the file",
            field("e", "data_offsets", json!([u64::MAX - 5, u64::MAX])),
        ),
        ("shape too large", field("a.weight", "shape", json!([3, 6]))),
        ("shape too small", field("a.weight", "shape", json!([3, 4]))),
        (
            "shape overflows to fit",
            field("a.weight", "shape", json!([1u64 << 63, 2, 15])),
        ),
        (
            "shape overflows with the type",
            field("a.weight", "shape", json!([(1u64 << 63) + 15])),
        ),
        (
            "nine dimensions",
            field("a.weight", "shape", json!([3, 5, 1, 1, 1, 1, 1, 1, 1])),
        ),
        (
            "shape of text",
            field("a.weight", "shape", json!(["3", "5"])),
        ),
        ("wrong type", field("a.weight", "dtype", json!("F32"))),
        ("type is a number", field("a.weight", "dtype", json!(16))),
        (
            "type of a long name",
            field("a.weight", "dtype", json!("X".repeat(1000))),
        ),
        (
            "absurd shape of an unknown type",
            field("e", "shape", json!([u64::MAX, 3])),
        ),
        ("name with a slash", renamed("../x")),
        ("name with a backslash", renamed("..\\\\x")),
        ("name with dots", renamed("a..b")),
        ("hidden name", renamed(".x")),
        ("empty name", renamed("")),
        ("name with a blank", renamed("a b")),
        ("name with a control character", renamed("a\\u0000b")),
        ("name with a letter of another script", renamed("ä")),
        ("long name", renamed(&"n".repeat(257))),
        (
            "deep nesting",
            edited(&|v| {
                v["__metadata__"]["x"] = (0..100).fold(json!(1), |inner, _| json!([inner]));
            }),
        ),
    ]
}

/// What the refusal of a mutation must say: else it is refused for another reason than its own.
const SAID: [(&str, &str); 16] = [
    ("length beyond the file", "but the file ends at"),
    ("length above the limit", "the limit is"),
    ("truncated in the header", "truncated"),
    ("truncated by one byte", "truncated"),
    ("one trailing byte", "trailing bytes"),
    ("duplicate tensor", "`c` appears twice"),
    ("duplicate tensor by escape", "`c` appears twice"),
    ("duplicate field", "`a.weight` has a key twice"),
    ("duplicate metadata", "appears twice"),
    ("offsets overlap", "`c` overlaps"),
    ("two tensors in one place", "overlaps the one before it"),
    ("a hole", "`c` leaves a hole"),
    ("shape overflows to fit", "`a.weight`"),
    ("shape overflows with the type", "`a.weight`"),
    ("name with a slash", "has slashes"),
    ("hidden name", "a tensor name"),
];

// hazard: truncated: refused; names the file, says truncated or trailing bytes
// hazard: header-length: refused; names the file and the length claimed
// hazard: header-layout: refused; names the tensor
// hazard: header-keys: refused; names the tensor
// hazard: header-names: refused
// hazard: shape-overflow: refused; names the tensor and its shape
#[test]
fn each_mutation_is_refused_and_named() {
    let first = mutations().len();
    assert!(first > 55);
    for (what, bytes) in mutations() {
        let Err(error) = read(&bytes) else {
            panic!("accepted: {what}");
        };
        assert!(
            matches!(error.code(), Code::Checkpoint | Code::Unsupported),
            "{what}: {error}"
        );
        assert!(error.what().contains("x.safetensors"), "{what}: {error}");
        assert!(error.to_string().len() < 1000, "{what}");
        for (_, words) in SAID.iter().filter(|(of, _)| *of == what) {
            assert!(error.to_string().contains(words), "{what}: {error}");
        }
    }
    let named = |what: &str| mutations().iter().any(|(of, _)| *of == what);
    assert!(SAID.iter().all(|(what, _)| named(what)));
}

#[test]
fn harmless_variety_is_accepted() {
    let data = vec![7u8; DATA_BYTES as usize];
    let json = testing::header_json(&sample());
    for text in [
        json.trim_end().to_string(),
        format!("{json}\n\t "),
        json.replace(',', " ,\n "),
        json.replacen("\"c\"", "\"\\u0063\"", 1),
        {
            let mut value = header_value();
            value.as_object_mut().unwrap().shift_remove("__metadata__");
            value.to_string()
        },
    ] {
        read(&testing::assemble(text.as_bytes(), &data)).unwrap();
    }
    assert!(
        read(&testing::assemble(b"{}", &[]))
            .unwrap()
            .tensors
            .is_empty()
    );
}

proptest! {
    /// One byte changed anywhere: refused, or a header whose tensors still fill the file exactly.
    #[test]
    fn a_flipped_byte_never_breaks_the_sums(at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut json = testing::header_json(&sample()).into_bytes();
        let at = at.index(json.len());
        json[at] = to;
        if let Ok(tensors) = header::parse(&json, DATA_BYTES) {
            let mut end = 0;
            for t in &tensors {
                prop_assert_eq!(t.begin, end);
                end = t.end;
                prop_assert!(header::sane_name(&t.name));
                if let Stored::Ours(dtype) = t.dtype {
                    let bytes = t.shape.iter().product::<usize>() * dtype.bytes();
                    prop_assert_eq!(bytes as u64, t.end - t.begin);
                }
            }
            prop_assert_eq!(end, DATA_BYTES);
        }
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), data in any::<u64>()) {
        let _ = header::parse(&bytes, data);
        let _ = header::parse(&[b"{", &bytes[..]].concat(), data);
    }
}
