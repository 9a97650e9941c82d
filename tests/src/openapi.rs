//! Checks replies against an OpenAPI 3.1 document: is this status documented there, with this content type, and does the
//! body fit its schema? Knows nothing about the API but the document.

use anyhow::{Context, Result};
use jsonschema::{Draft, Validator};
use serde_json::{Value, json};

/// A parsed document, ready to check replies.
pub struct Checker {
    document: Value,
}

impl Checker {
    /// Takes the document; every schema in it must compile.
    ///
    /// # Errors
    /// No `paths`, or a schema that is none.
    pub fn new(document: Value) -> Result<Self> {
        let checker = Self { document };
        checker.document["paths"].as_object().context("the OpenAPI document has no paths")?;
        for name in checker.document["components"]["schemas"].as_object().into_iter().flat_map(|schemas| schemas.keys())
        {
            let reference = json!({"$ref": format!("#/components/schemas/{}", escape(name))});
            checker.validator(&reference).with_context(|| format!("the schema {name}"))?;
        }
        Ok(checker)
    }

    /// Checks one reply. `path` is the one that was asked for, with its query; it is matched against the templates.
    ///
    /// A path that no template fits may answer 404, and a method that the path doesn't have 405; the body must then be
    /// what the document calls `Problem`.
    ///
    /// # Panics
    /// The reply isn't documented; the message says what is, and where the body doesn't fit.
    pub fn check(&self, method: &str, path: &str, status: u16, content_type: &str, body: &[u8]) {
        if let Err(error) = self.try_check(method, path, status, content_type, body) {
            let body = String::from_utf8_lossy(body);
            panic!(
                "the reply isn't as documented: {method} {path} gave {status} {content_type}\n{error:#}\nbody: {body}"
            );
        }
    }

    /// As [`check`](Self::check), with an error for a panic.
    ///
    /// # Errors
    /// The reply isn't documented.
    pub fn try_check(&self, method: &str, path: &str, status: u16, content_type: &str, body: &[u8]) -> Result<()> {
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let media = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let Some((template, item)) = self.find_path(path) else {
            anyhow::ensure!(status == 404, "no path of the document fits");
            return self.check_problem(&media, body);
        };
        let wanted =
            if method == "HEAD" && item.get("head").is_none() { "get".into() } else { method.to_ascii_lowercase() };
        let Some(operation) = item.get(&wanted) else {
            anyhow::ensure!(status == 405, "{template} has no {method} in the document");
            return self.check_problem(&media, body);
        };
        let responses = operation["responses"].as_object().with_context(|| format!("{template} has no responses"))?;
        let class = format!("{}XX", status / 100);
        let keys = [status.to_string(), class, "default".to_owned()];
        let response = keys.iter().find_map(|key| responses.get(key)).with_context(|| {
            let known: Vec<&String> = responses.keys().collect();
            format!("{template} documents {known:?}, not {status}")
        })?;
        let response = self.resolve(response)?;
        if method == "HEAD" {
            return Ok(());
        }
        match response.get("content").and_then(Value::as_object).filter(|content| !content.is_empty()) {
            None => {
                anyhow::ensure!(body.is_empty(), "{template} documents no body for {status}");
                Ok(())
            }
            Some(content) => {
                let known: Vec<&String> = content.keys().collect();
                let found = content.iter().find(|(name, _)| name.eq_ignore_ascii_case(&media));
                let (_, entry) = found.with_context(|| format!("{template} documents {known:?} for {status}"))?;
                entry.get("schema").map_or(Ok(()), |schema| self.check_body(schema, &media, body))
            }
        }
    }

    fn check_problem(&self, media: &str, body: &[u8]) -> Result<()> {
        anyhow::ensure!(media == "application/problem+json", "an error must be application/problem+json");
        self.check_body(&json!({"$ref": "#/components/schemas/Problem"}), media, body)
    }

    fn check_body(&self, schema: &Value, media: &str, body: &[u8]) -> Result<()> {
        let json = media == "application/json" || media.ends_with("+json");
        let value = if json {
            serde_json::from_slice(body).context("the body isn't JSON")?
        } else {
            Value::String(String::from_utf8(body.to_vec()).context("the body isn't text")?)
        };
        let validator = self.validator(schema)?;
        let errors: Vec<String> = validator
            .iter_errors(&value)
            .map(|error| format!("at {:?}: {error}", error.instance_path().as_str()))
            .collect();
        anyhow::ensure!(errors.is_empty(), "the body doesn't fit its schema:\n  {}", errors.join("\n  "));
        Ok(())
    }

    /// A validator for one schema, in whose sight all of the document's components are.
    fn validator(&self, schema: &Value) -> Result<Validator> {
        let whole = json!({"allOf": [schema], "components": self.document["components"]});
        let compiled = jsonschema::options().with_draft(Draft::Draft202012).build(&whole);
        compiled.map_err(|error| anyhow::anyhow!("no valid schema: {error}"))
    }

    /// The template that fits a path, the one with the most literal segments first.
    fn find_path(&self, path: &str) -> Option<(&str, &Value)> {
        let paths = self.document["paths"].as_object()?;
        let fits = |template: &str| {
            let (mut left, mut right) = (template.split('/'), path.split('/'));
            loop {
                match (left.next(), right.next()) {
                    (None, None) => return true,
                    (Some(want), Some(have)) if want == have || (is_parameter(want) && !have.is_empty()) => {}
                    _ => return false,
                }
            }
        };
        let parameters = |template: &str| template.split('/').filter(|segment| is_parameter(segment)).count();
        let found =
            paths.iter().filter(|(template, _)| fits(template)).min_by_key(|(template, _)| parameters(template))?;
        Some((found.0, found.1))
    }

    /// Follows a `$ref` to a response of the document.
    fn resolve<'a>(&'a self, response: &'a Value) -> Result<&'a Value> {
        let Some(reference) = response.get("$ref").and_then(Value::as_str) else { return Ok(response) };
        let pointer = reference.strip_prefix('#').with_context(|| format!("a reference elsewhere: {reference}"))?;
        self.document.pointer(pointer).with_context(|| format!("nothing at {reference}"))
    }
}

fn is_parameter(segment: &str) -> bool {
    segment.starts_with('{') && segment.ends_with('}')
}

/// A name as a segment of a JSON pointer in a URI fragment.
fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1").replace('%', "%25")
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = "application/json";
    const PROBLEM: &str = "application/problem+json";

    fn checker() -> Checker {
        let problem = json!({"content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}});
        Checker::new(json!({
            "openapi": "3.1.0",
            "paths": {
                "/v1/things/{name}": {"get": {"responses": {
                    "200": {"content": {JSON: {"schema": {"$ref": "#/components/schemas/Thing"}}}},
                    "4XX": {"$ref": "#/components/responses/Refused"},
                }}},
                "/v1/things/all": {"get": {"responses": {"204": {"description": "nothing"}}}},
                "/metrics": {"get": {"responses": {"200": {"content": {"text/plain": {"schema": {"type": "string"}}}}}}},
            },
            "components": {
                "responses": {"Refused": problem},
                "schemas": {
                    "Size": {"type": ["integer", "null"], "minimum": 1},
                    "Thing": {"type": "object", "required": ["size"],
                              "properties": {"size": {"$ref": "#/components/schemas/Size"}}},
                    "Problem": {"type": "object", "required": ["code"], "properties": {"code": {"type": "string"}}},
                },
            },
        }))
        .unwrap()
    }

    fn error(method: &str, path: &str, status: u16, content_type: &str, body: &str) -> String {
        format!("{:#}", checker().try_check(method, path, status, content_type, body.as_bytes()).unwrap_err())
    }

    #[test]
    fn documented_replies_pass() {
        let checker = checker();
        checker.check("GET", "/v1/things/a%2Fb?x=/y", 200, "application/json; charset=utf-8", br#"{"size":3}"#);
        checker.check("GET", "/v1/things/a", 200, JSON, br#"{"size":null,"more":1}"#);
        checker.check("GET", "/v1/things/a", 409, PROBLEM, br#"{"code":"busy"}"#);
        checker.check("GET", "/v1/things/all", 204, "", b"");
        checker.check("GET", "/metrics", 200, "text/plain; version=0.0.4", b"up 1\n");
        checker.check("HEAD", "/v1/things/a", 200, JSON, b"");
    }

    #[test]
    fn an_unknown_path_or_method_may_only_be_refused_with_a_problem() {
        checker().check("GET", "/nowhere", 404, PROBLEM, br#"{"code":"not-found"}"#);
        checker().check("DELETE", "/v1/things/a", 405, PROBLEM, br#"{"code":"method-not-allowed"}"#);
        assert!(error("GET", "/nowhere", 200, JSON, "{}").contains("no path"));
        assert!(error("DELETE", "/v1/things/a", 200, JSON, "{}").contains("has no DELETE"));
        assert!(error("GET", "/nowhere", 404, "text/plain", "no").contains("problem+json"));
    }

    #[test]
    fn an_undocumented_status_is_named_with_those_that_are() {
        let text = error("GET", "/v1/things/a", 500, PROBLEM, "{}");
        assert!(text.contains("200") && text.contains("4XX") && text.contains("not 500"), "{text}");
    }

    #[test]
    fn a_body_that_does_not_fit_is_told_with_its_place() {
        let text = error("GET", "/v1/things/a", 200, JSON, r#"{"size":0}"#);
        assert!(text.contains("/size") && text.contains("minimum"), "{text}");
        assert!(error("GET", "/v1/things/a", 200, JSON, "{}").contains("required"));
        assert!(error("GET", "/v1/things/a", 200, JSON, "{").contains("isn't JSON"));
        assert!(error("GET", "/v1/things/a", 200, "text/html", "{}").contains("application/json"));
        assert!(error("GET", "/v1/things/all", 204, JSON, "{}").contains("no body"));
    }

    #[test]
    fn a_document_with_a_broken_schema_is_refused() {
        let broken = json!({"paths": {}, "components": {"schemas": {"A": {"$ref": "#/components/schemas/Gone"}}}});
        assert!(Checker::new(broken).is_err());
    }

    #[test]
    #[should_panic(expected = "isn't as documented")]
    fn check_panics_where_try_check_fails() {
        checker().check("GET", "/v1/things/a", 200, JSON, b"[]");
    }
}
