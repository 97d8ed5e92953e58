//! One message of a conversation, handed to the template as the JSON object it came as.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};

/// `role`, `content` (a string, a list of parts, or null beside `tool_calls`) and whatever else a template reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub struct Message(Map<String, Value>);

impl Message {
    pub fn new(role: &str, text: &str) -> Message {
        let mut fields = Map::new();
        fields.insert("role".into(), role.into());
        fields.insert("content".into(), text.into());
        Message(fields)
    }

    /// With content in parts: objects with a `type`, such as `{"type": "text", "text": …}` or `{"type": "image", …}`.
    pub fn with_parts(role: &str, parts: Vec<Value>) -> Result<Message> {
        let mut fields = Map::new();
        fields.insert("role".into(), role.into());
        fields.insert("content".into(), Value::Array(parts));
        Message::try_from(fields).map_err(|cause| refused("the message", &cause))
    }

    /// The same message with other content parts, which must be objects.
    pub fn with_content(&self, parts: Vec<Value>) -> Message {
        // The old content may hold pictures: it is not copied first.
        let mut content = Some(Value::Array(parts));
        let field = |(key, value): (&String, &Value)| {
            let new = (key == "content").then(|| content.take()).flatten();
            (key.clone(), new.unwrap_or_else(|| value.clone()))
        };
        let mut fields: Map<String, Value> = self.0.iter().map(field).collect();
        if let Some(content) = content {
            fields.insert("content".into(), content);
        }
        Message(fields)
    }

    /// A conversation as a JSON list; `place` names it in errors, which are Code::Usage and say which message is wrong.
    pub fn list(json: &Value, place: &str) -> Result<Vec<Message>> {
        Message::take_list(json.clone(), place)
    }

    /// As [`Message::list`], without a copy.
    pub fn take_list(json: Value, place: &str) -> Result<Vec<Message>> {
        let Value::Array(list) = json else {
            return Err(refused(place, "messages are a JSON list of objects"));
        };
        let one = |(i, value): (usize, Value)| {
            let message = match value {
                Value::Object(fields) => Message::try_from(fields),
                _ => Err("a message is a JSON object".to_owned()),
            };
            message.map_err(|cause| refused(place, &format!("message {i}: {cause}")))
        };
        list.into_iter().enumerate().map(one).collect()
    }

    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or("")
    }

    /// The content where it is one string.
    pub fn text(&self) -> Option<&str> {
        self.0.get("content").and_then(Value::as_str)
    }

    /// The content where it is in parts.
    pub fn parts(&self) -> Option<&[Value]> {
        self.0
            .get("content")
            .and_then(Value::as_array)
            .map(Vec::as_slice)
    }

    /// Everything, as the template sees it.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }
}

fn refused(place: &str, cause: &str) -> Error {
    Error::new(
        Code::Usage,
        format!("cannot use {place}"),
        cause,
        r#"write messages like [{"role": "user", "content": "Hello"}]"#,
    )
}

impl TryFrom<Map<String, Value>> for Message {
    type Error = String;

    fn try_from(fields: Map<String, Value>) -> std::result::Result<Message, String> {
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err("`role` is missing or not a string".into());
        }
        match fields.get("content") {
            None | Some(Value::Null | Value::String(_)) => {}
            Some(Value::Array(parts)) => {
                let wrong = parts.iter().position(|p| !p.is_object());
                if let Some(i) = wrong {
                    return Err(format!("part {i} of `content` is not an object"));
                }
            }
            // Tool results may be structured.
            Some(Value::Object(_)) if fields.get("role").is_some_and(|r| r != "user") => {}
            Some(_) => return Err("`content` is neither a string nor a list of parts".into()),
        }
        Ok(Message(fields))
    }
}
