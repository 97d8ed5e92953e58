//! A minijinja environment that behaves like transformers' Jinja2 one.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::python;

/// The message of a template's `raise_exception`, kept apart from errors of the engine.
#[derive(Debug)]
pub(super) struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl Raised {
    /// Looks through the causes: a call inside a macro wraps the error.
    pub(super) fn find<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a str> {
        let mut next = Some(error);
        while let Some(e) = next {
            if let Some(raised) = e.downcast_ref::<Raised>() {
                return Some(&raised.0);
            }
            next = e.source();
        }
        None
    }
}

pub(super) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(method);
    env.set_formatter(|out, _, value| {
        let mut text = String::new();
        python::write_str(&mut text, value)?;
        out.write_str(&text).map_err(Error::from)
    });
    env.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            Err(Error::new(
                ErrorKind::InvalidOperation,
                "the template raised an exception",
            )
            .with_source(Raised(message)))
        },
    );
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| text_of(value));
    env.add_filter("join", join);
    env.add_filter("length", length);
    env.add_filter("count", length);
    env.add_filter("int", int);
    env.add_filter("float", float);
    env.add_function("cycler", |items: Rest<Value>| {
        minijinja_contrib::globals::cycler(items.0)
    });
    env.add_function("joiner", |separator: Option<Value>| {
        minijinja_contrib::globals::joiner(separator)
    });
    // Python's booleans are numbers.
    env.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    env.add_test("sequence", |value: &Value| {
        // Python's strings and dicts have a length and can be indexed, which is all that Jinja2 asks.
        matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::String | ValueKind::Map
        )
    });
    env
}

fn text_of(value: &Value) -> Result<String, Error> {
    let mut text = String::new();
    python::write_str(&mut text, value)?;
    Ok(text)
}

/// As transformers overrides it: `json.dumps(x, ensure_ascii, indent, separators, sort_keys)`, nothing escaped for HTML.
fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let arg = |i: usize| -> Result<Option<Value>, Error> {
        match args.get(i) {
            Some(v) => Ok(Some(v.clone())),
            None => kwargs.get(names[i]),
        }
    };
    let style = python::JsonStyle::new(arg(0)?, arg(1)?, arg(2)?, arg(3)?)?;
    kwargs.assert_all_used()?;
    python::json(value, &style)
}

fn join(
    state: &State,
    value: &Value,
    separator: Option<&str>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let separator = match separator {
        Some(s) => s.to_owned(),
        None => kwargs.get::<Option<String>>("d")?.unwrap_or_default(),
    };
    let attribute: Option<Value> = kwargs.get("attribute")?;
    kwargs.assert_all_used()?;
    if value.is_undefined() {
        return Ok(String::new());
    }
    let mut out = String::new();
    for (i, item) in value.try_iter()?.enumerate() {
        if i > 0 {
            out.push_str(&separator);
        }
        match &attribute {
            Some(name) => {
                let item = state.apply_filter("attr", &[item, name.clone()])?;
                python::write_str(&mut out, &item)?;
            }
            None => python::write_str(&mut out, &item)?,
        }
    }
    Ok(out)
}

/// Jinja2's undefined has length 0.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value.len().ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("a value of type {} has no length", value.kind()),
        )
    })
}

/// `int(value)`, and `default` (0) for what is no number.
fn int(value: &Value, default: Option<Value>) -> Value {
    let number = |x: f64| {
        let whole = x.trunc();
        (whole.abs() < 1e18).then(|| Value::from(whole as i64))
    };
    let parsed = match value.kind() {
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => Some(value.clone()),
        ValueKind::Number => f64::try_from(value.clone()).ok().and_then(number),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default().trim();
            let whole = text.parse::<i64>().ok().map(Value::from);
            whole.or_else(|| text.parse().ok().and_then(number))
        }
        _ => None,
    };
    parsed.or(default).unwrap_or_else(|| Value::from(0))
}

/// `float(value)`, and `default` (0.0) for what is no number.
fn float(value: &Value, default: Option<Value>) -> Value {
    let parsed = match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => value.as_str().and_then(|text| text.trim().parse().ok()),
        _ => None,
    };
    parsed
        .map(Value::from)
        .or(default)
        .unwrap_or_else(|| Value::from(0.0))
}

/// Python's methods: a few that the contrib crate lacks or does its own way, then its own.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = python::string_method(text, name, args)?
    {
        return Ok(result);
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}
