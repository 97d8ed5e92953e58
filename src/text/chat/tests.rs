use super::*;
use serde_json::json;

fn hello() -> Vec<Message> {
    vec![Message::new("user", "Hi")]
}

fn render(source: &str) -> Result<String> {
    ChatTemplate::from_source(source, &[("bos_token", "<s>")])?
        .render(&hello(), &RenderOptions::default())
}

fn text(source: &str) -> String {
    render(source).unwrap_or_else(|e| panic!("{source}: {e}"))
}

#[test]
fn what_a_template_sees() {
    assert_eq!(text("{{ bos_token }}{{ eos_token }}|"), "<s>|");
    assert_eq!(
        text("{{ tools is none }}{{ documents is none }}"),
        "TrueTrue"
    );
    assert_eq!(text("{{ add_generation_prompt }}"), "False");
    let mut variables = Map::new();
    variables.insert("enable_thinking".into(), json!(false));
    variables.insert("bos_token".into(), json!("<b>"));
    let options = RenderOptions {
        add_generation_prompt: true,
        variables: Some(&variables),
        ..RenderOptions::default()
    };
    let t = ChatTemplate::from_source(
        "{{ bos_token }}{{ enable_thinking }}{{ add_generation_prompt }}",
        &[("bos_token", "<s>")],
    );
    assert_eq!(
        t.unwrap().render(&hello(), &options).unwrap(),
        "<b>FalseTrue"
    );
}

/// Expected values: transformers 5.17 with Jinja2, on the same one message.
#[test]
fn pythons_ways() {
    for (source, expected) in PYTHON {
        assert_eq!(text(source), *expected, "{source}");
    }
}

const PYTHON: &[(&str, &str)] = &[
    ("{{ messages }}", "[{'role': 'user', 'content': 'Hi'}]"),
    (
        r#"{{ [1, 'a', "b'c", none, true, 1.0, {'x': 'y'}] }}"#,
        r#"[1, 'a', "b'c", None, True, 1.0, {'x': 'y'}]"#,
    ),
    (
        r#"{{ ['a\nb', 'é', '\t', '"', "'"] }}"#,
        r#"['a\nb', 'é', '\t', '"', "'"]"#,
    ),
    ("{{ 'a' ~ none ~ true ~ 0.5 ~ nope }}", "aNoneTrue0.5"),
    (
        "{{ [1, 2.0, none]|join(', ') }} {{ messages|join('-', attribute='role') }}",
        "1, 2.0, None user",
    ),
    (
        "{{ 1e-7 }} {{ 1e16 }} {{ 123456.789 }}",
        "1e-07 1e+16 123456.789",
    ),
    (
        "{{ messages[0]|tojson }}",
        r#"{"role": "user", "content": "Hi"}"#,
    ),
    (
        "{{ {'b': [1, {}], 'a': none}|tojson(indent=2, sort_keys=true) }}",
        "{\n  \"a\": null,\n  \"b\": [\n    1,\n    {}\n  ]\n}",
    ),
    (
        "{{ ['é🚀', 1e20]|tojson(ensure_ascii=true) }}{{ [1, {'a': 2}]|tojson(separators=(',', ':')) }}",
        r#"["\u00e9\ud83d\ude80", 1e+20][1,{"a":2}]"#,
    ),
    (r#"{{ '<>&\'"é'|tojson }}{{ []|tojson }}"#, r#""<>&'\"é"[]"#),
    (
        "{{ nope|length }} {{ nope|default('d') }} {{ nope is none }} {{ true is number }}",
        "0 d False True",
    ),
    (
        "{{ 'x' is sequence }} {{ {} is sequence }} {{ 'x' is iterable }} {{ 1 is sequence }}",
        "True True True False",
    ),
    (
        "{{ '  a b  c '.split() }} {{ 'a,b,,c'.split(',') }} {{ 'a,b,c'.split(',', 1) }} {{ 'a b c d'.rsplit(' ', 1) }} {{ ' a b c '.split(none, 1) }}",
        "['a', 'b', 'c'] ['a', 'b', '', 'c'] ['a', 'b,c'] ['a b c', 'd'] ['a', 'b c ']",
    ),
    (
        "{{ 'żółw'.find('w') }} {{ ''.isdigit() }} {{ 'aXbX'.replace('X', '-', 1) }} {{ 'abc'.startswith(('x', 'a')) }} {{ 'abc'.removeprefix('a') }} {{ 'a-b-c'.rpartition('-')[0] }}",
        "3 False a-bX True bc a-b",
    ),
    (
        "{{ 1.5|int }} {{ '3'|int + 1 }} {{ 'x'|int(7) }} {{ 'x'|int }} {{ '2.5'|float }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }}",
        "1 4 7 0 2.5 3 -4 2",
    ),
    (
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{% set j = joiner(', ') %}{{ j() }}1{{ j() }}2",
        "aba1, 2",
    ),
    (
        "{% set x = {'items': 1, 'get': 2} %}{% for k, v in x.items() %}{{ k }}={{ v }} {% endfor %}{{ x.get('nope', 5) }}",
        "items=1 get=2 5",
    ),
    (
        "a  \n  {% if true %}  \n  b\n  {% endif %}  \nc\n\n  {# c #}\nd {# e #} f\n{{ 'x' }}\ng\n",
        "a  \n  \n  b\n  \nc\n\nd  f\nx\ng",
    ),
    ("  {%- if true -%}  \n x \n  {%- endif -%}  \n y", "xy"),
    (
        "{{- ' a' -}}  \n  b  {{ 'c' -}}\n\n d {{- 'e' }}",
        " ab  cde",
    ),
];

#[test]
fn generation_blocks_are_scopes() {
    assert_eq!(
        text("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"),
        "21"
    );
    assert_eq!(
        text("a \n {%- generation -%} b {%- endgeneration -%} \n c"),
        "abc"
    );
    assert_eq!(
        text("x\n  {% generation %}\n y\n  {% endgeneration %}\nz"),
        "x\n y\nz"
    );
    assert_eq!(
        text("{% raw %}{% generation %}{% endraw %}{# {% generation %} #}{{ 'generation' }}"),
        "{% generation %}generation"
    );
}

#[test]
fn line_ends_are_newlines() {
    assert_eq!(text("a\r\n{% if true %}\r\nb\r{% endif %}\r\n"), "a\nb\n");
}

#[test]
fn dates() {
    let now = "2025-03-07T04:05:09".parse().unwrap();
    let at = |format: &str| {
        let source = format!("{{{{ strftime_now('{format}') }}}}");
        let options = RenderOptions {
            now: Some(now),
            ..RenderOptions::default()
        };
        ChatTemplate::from_source(&source, &[])?.render(&hello(), &options)
    };
    assert_eq!(at("%d %b %Y").unwrap(), "07 Mar 2025");
    assert_eq!(
        at("%Y-%m-%d %H:%M:%S %j %-d %B").unwrap(),
        "2025-03-07 04:05:09 066 7 March"
    );
    assert!(at("%Q").unwrap_err().cause().contains("date format"));
    assert!(at("%z").is_err());
    assert!(text("{{ strftime_now('%Y') }}").parse::<i32>().unwrap() >= 2025);
}

#[test]
fn what_a_template_refuses() {
    let e = render(
        "{% macro f() %}{{ raise_exception('roles must ' ~ 'alternate') }}{% endmacro %}{{ f() }}",
    );
    let e = e.unwrap_err();
    assert_eq!((e.code(), e.cause()), (Code::Text, "roles must alternate"));
    for (source, word) in [
        ("{% if %}", ":1"),
        ("{% for x in %}{% endfor %}", ":1"),
        ("a\n{{ nope.attr }}", "2"),
        ("{{ 'a' + 1 }}", "+"),
        ("{% include 'x' %}", "x"),
        ("{{ messages[0].content.nope() }}", "nope"),
    ] {
        let e = render(source).unwrap_err();
        assert_eq!(e.code(), Code::Text, "{source}");
        assert!(e.cause().contains(word), "{source}: {e}");
    }
    let t = ChatTemplate::from_source("x", &[]).unwrap();
    assert!(t.render(&[], &RenderOptions::default()).is_err());
}

// hazard: templates: an error within its fuel, steps and output
#[test]
fn hostile_templates_end() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}";
    let ends = "{% endfor %}{% endfor %}{% endfor %}";
    for source in [
        format!("{loops}{ends}"),
        format!("{loops}{}{ends}", "x".repeat(4000)),
        format!("{loops}{{{{ 'x' * 99999 }}}}{ends}"),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}".into(),
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}".into(),
        "{{ 'x' * 10**18 }}".into(),
        format!("{}1{}", "{{ ".to_owned() + &"(".repeat(5001), ")".repeat(5001) + " }}"),
        "{{ [1].append(2) }}".into(),
    ] {
        let head: String = source.chars().take(80).collect();
        let e = render(&source).expect_err(&head);
        assert_eq!(e.code(), Code::Text, "{head}");
    }
}

#[test]
fn fuel_grows_with_the_conversation() {
    let long: Vec<Message> = (0..2000).map(|_| Message::new("user", "x")).collect();
    let t = ChatTemplate::from_source(
        "{% for m in messages %}{% for k in range(200) %}{% if m.content == 'y' %}y{% endif %}{% endfor %}{% endfor %}ok",
        &[],
    );
    assert_eq!(
        t.unwrap().render(&long, &RenderOptions::default()).unwrap(),
        "ok"
    );
}

#[test]
fn messages_are_checked() {
    let list = |v: Value| Message::list(&v, "--messages");
    let ok = list(json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": null, "tool_calls": []},
        {"role": "tool", "content": {"t": 1}},
        {"content": [{"type": "text", "text": "b"}, {"type": "image", "image": "x.png"}], "role": "user", "name": "n"},
    ]))
    .unwrap();
    assert_eq!((ok[0].role(), ok[0].text()), ("user", Some("a")));
    assert_eq!(ok[3].parts().unwrap().len(), 2);
    // Handed on as it came, order of keys included.
    let shown = serde_json::to_string(&ok[3]).unwrap();
    assert!(shown.starts_with(r#"{"content":"#) && shown.ends_with(r#""name":"n"}"#));
    for (bad, word) in [
        (json!({}), "list"),
        (json!(["x"]), "message 0"),
        (json!([{"content": "x"}]), "role"),
        (json!([{"role": 1, "content": "x"}]), "role"),
        (json!([{"role": "user", "content": 3}]), "content"),
        (
            json!([{"role": "user", "content": "a"}, {"role": "user", "content": ["a"]}]),
            "message 1",
        ),
    ] {
        let e = list(bad).unwrap_err();
        assert_eq!(e.code(), Code::Usage);
        assert!(e.cause().contains(word), "{e}");
    }
    assert!(serde_json::from_str::<Message>(r#"{"role": "user", "content": "a"}"#).is_ok());
    assert!(serde_json::from_str::<Message>(r#"{"content": "a"}"#).is_err());
    assert!(Message::with_parts("user", vec![json!("x")]).is_err());
}

#[test]
fn where_templates_lie() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let shown = |tools: Option<&[Value]>| {
        let options = RenderOptions {
            tools,
            ..RenderOptions::default()
        };
        ChatTemplate::load(dir.path()).map(|t| t.expect("a template").render(&hello(), &options))
    };
    let tools = [json!({"type": "function"})];
    assert!(ChatTemplate::load(dir.path()).unwrap().is_none());

    write(
        "tokenizer_config.json",
        r#"{"eos_token": {"content": "</s>"}, "bos_token": null}"#,
    );
    assert!(ChatTemplate::load(dir.path()).unwrap().is_none());

    let config = |template: Value| {
        json!({"chat_template": template, "eos_token": {"content": "</s>"}}).to_string()
    };
    write(
        "tokenizer_config.json",
        &config(json!("config{{ eos_token }}")),
    );
    assert_eq!(shown(None).unwrap().unwrap(), "config</s>");

    let named =
        json!([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]);
    write("tokenizer_config.json", &config(named));
    assert_eq!(shown(None).unwrap().unwrap(), "d");
    assert_eq!(shown(Some(&tools)).unwrap().unwrap(), "t");

    write(
        "tokenizer_config.json",
        &config(json!([{"name": "rag", "template": "r"}])),
    );
    let e = shown(None).unwrap().unwrap_err();
    assert!(e.cause().contains("rag"), "{e}");
    for bad in [json!(3), json!([3]), json!([{"name": "default"}])] {
        write("tokenizer_config.json", &config(bad));
        assert!(shown(None).unwrap_err().what().contains("chat_template"));
    }

    write("chat_template.json", r#"{"chat_template": "json"}"#);
    assert_eq!(shown(None).unwrap().unwrap(), "json");
    write("chat_template.jinja", "jinja\n");
    assert_eq!(shown(None).unwrap().unwrap(), "jinja");
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    write("additional_chat_templates/tool_use.jinja", "tools");
    assert_eq!(shown(Some(&tools)).unwrap().unwrap(), "tools");
    assert_eq!(shown(None).unwrap().unwrap(), "jinja");

    write("chat_template.jinja", "{% if %}");
    let e = shown(None).unwrap_err();
    assert!(e.what().contains("chat_template.jinja"), "{e}");
}
