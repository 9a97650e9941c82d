//! A list of many pages as one document: the first page, with everybody's items.

use serde_json::Value;

use super::{Reply, encode};
use crate::error::Failure;

/// Asks `get` for one page after the other.
pub(crate) fn all_pages(
    path: &str,
    query: &[String],
    get: impl Fn(&str) -> Result<Reply, Failure>,
) -> Result<Reply, Failure> {
    let page = |cursor: Option<&str>| {
        let mut query = query.to_vec();
        query.extend(cursor.map(|cursor| format!("cursor={}", encode(cursor))));
        if query.is_empty() { path.to_owned() } else { format!("{path}?{}", query.join("&")) }
    };
    let first = get(&page(None))?;
    let mut whole: Value = first.read()?;
    let Some(mut cursor) = next_cursor(&whole) else { return Ok(first) };
    loop {
        let mut page: Value = get(&page(Some(&cursor)))?.read()?;
        let next = next_cursor(&page);
        if let (Some(Value::Array(items)), Some(Value::Array(more))) =
            (whole.get_mut("items"), page.get_mut("items").map(Value::take))
        {
            items.extend(more);
        }
        match next {
            Some(next) if next == cursor => {
                return Err(Failure::internal("agentd's list of instances goes in a circle".into()));
            }
            Some(next) => cursor = next,
            None => break,
        }
    }
    if let Some(cursor) = whole.get_mut("next_cursor") {
        *cursor = Value::Null;
    }
    Ok(Reply { status: first.status, body: whole.to_string() })
}

fn next_cursor(page: &Value) -> Option<String> {
    page.get("next_cursor").and_then(Value::as_str).map(str::to_owned)
}
