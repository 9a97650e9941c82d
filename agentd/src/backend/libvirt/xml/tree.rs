//! A definition as a tree that knows where in the text each part of it is, so that a change replaces those bytes and no
//! others: comments, foreign namespaces, order and white space stay.

use std::ops::Range;

use quick_xml::Reader;
use quick_xml::events::Event;

/// The deepest nesting that is read; libvirt's own definitions stay below twenty.
const DEEPEST: usize = 256;

/// One element.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in super::super) struct Element {
    /// Its name, with its prefix where it has one.
    pub(in super::super) name: String,
    /// All of it.
    pub(in super::super) whole: Range<usize>,
    /// Its start tag; all of it where it is empty.
    pub(in super::super) tag: Range<usize>,
    /// What is between its tags; `None` for `<empty/>`.
    pub(in super::super) inner: Option<Range<usize>>,
    /// Its attributes: name and where the value is, without quotes.
    attributes: Vec<(String, Range<usize>)>,
    /// The elements in it.
    pub(in super::super) children: Vec<Element>,
}

/// Reads a text with one element at its root.
pub(in super::super) fn parse(xml: &str) -> Result<Element, String> {
    let mut reader = Reader::from_str(xml);
    let position = |reader: &Reader<&[u8]>| usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX);
    let mut open: Vec<Element> = Vec::new();
    let mut root = None;
    loop {
        let begin = position(&reader);
        let event = reader.read_event().map_err(|error| format!("its definition can't be read: {error}"))?;
        let end = position(&reader);
        match event {
            Event::Start(tag) => {
                if open.len() >= DEEPEST {
                    return Err("its definition is nested too deep".into());
                }
                let name = tag.name().as_ref().to_owned();
                open.push(Element {
                    name,
                    whole: begin..end,
                    tag: begin..end,
                    inner: Some(end..end),
                    attributes: attributes(xml, begin..end)?,
                    children: Vec::new(),
                });
            }
            Event::Empty(tag) => {
                let name = tag.name().as_ref().to_owned();
                let attributes = attributes(xml, begin..end)?;
                let element =
                    Element { name, whole: begin..end, tag: begin..end, inner: None, attributes, children: Vec::new() };
                close(element, &mut open, &mut root)?;
            }
            Event::End(_) => {
                let mut element = open.pop().ok_or("its definition has an end without a beginning")?;
                element.inner = element.inner.map(|inner| inner.start..begin);
                element.whole.end = end;
                close(element, &mut open, &mut root)?;
            }
            Event::Eof if open.is_empty() => return root.ok_or_else(|| "its definition is empty".into()),
            Event::Eof => return Err("its definition ends in the middle".into()),
            _ => {}
        }
    }
}

fn close(element: Element, open: &mut [Element], root: &mut Option<Element>) -> Result<(), String> {
    match (open.last_mut(), &root) {
        (Some(parent), _) => parent.children.push(element),
        (None, None) => *root = Some(element),
        (None, Some(_)) => return Err("its definition has more than one root".into()),
    }
    Ok(())
}

/// The attributes of a tag: what is between quotes, after a name and an equals sign.
fn attributes(xml: &str, tag: Range<usize>) -> Result<Vec<(String, Range<usize>)>, String> {
    let wrong = || "its definition has an attribute that can't be read".to_owned();
    let text = xml.get(tag.clone()).ok_or_else(wrong)?;
    let mut found = Vec::new();
    let mut at = text.find(|c: char| c.is_ascii_whitespace()).unwrap_or(text.len());
    while let Some(equals) = text[at..].find('=') {
        let name = text[at..at + equals].trim();
        let rest = at + equals + 1;
        let quote_at = rest + text[rest..].find(['"', '\'']).ok_or_else(wrong)?;
        let quote = text[quote_at..].chars().next().ok_or_else(wrong)?;
        let begin = quote_at + 1;
        let end = begin + text[begin..].find(quote).ok_or_else(wrong)?;
        found.push((name.to_owned(), tag.start + begin..tag.start + end));
        at = end + 1;
    }
    Ok(found)
}

impl Element {
    /// The first child of this name.
    pub(in super::super) fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    /// The children of this name.
    pub(in super::super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// An attribute's value, as it is written.
    pub(in super::super) fn attribute<'a>(&self, xml: &'a str, name: &str) -> Option<&'a str> {
        self.attributes.iter().find(|(known, _)| known == name).and_then(|(_, range)| xml.get(range.clone()))
    }

    /// What is between its tags, without the white space around it.
    pub(in super::super) fn text<'a>(&self, xml: &'a str) -> &'a str {
        self.inner.clone().and_then(|inner| xml.get(inner)).unwrap_or_default().trim()
    }
}

/// Changes to a text that has been read as a tree, made all at once.
#[derive(Debug, Default)]
pub(in super::super) struct Edits(Vec<(Range<usize>, String)>);

impl Edits {
    /// Another text between an element's tags.
    pub(in super::super) fn set_text(&mut self, xml: &str, element: &Element, text: &str) {
        match &element.inner {
            Some(inner) => self.0.push((inner.clone(), text.to_owned())),
            None => self.open(xml, element, text),
        }
    }

    /// Another value of an attribute, or one more.
    pub(in super::super) fn set_attribute(&mut self, element: &Element, name: &str, value: &str) {
        match element.attributes.iter().find(|(known, _)| known == name) {
            Some((_, range)) => self.0.push((range.clone(), value.to_owned())),
            None => {
                let at = element.tag.start + 1 + element.name.len();
                self.0.push((at..at, format!(" {name}='{value}'")));
            }
        }
    }

    /// One more child at an element's end, on a line of its own where its children have that.
    pub(in super::super) fn append(&mut self, xml: &str, parent: &Element, child: &str) {
        let Some(inner) = &parent.inner else { return self.open(xml, parent, child) };
        let indent =
            |at: usize| xml[..at].rsplit_once('\n').map(|(_, line)| line).filter(|line| line.trim().is_empty());
        let of_children = parent.children.last().and_then(|child| indent(child.whole.start));
        let text = match of_children {
            Some(indent) => format!("\n{indent}{child}"),
            None => child.to_owned(),
        };
        let at = parent.children.last().map_or(inner.start, |child| child.whole.end);
        self.0.push((at..at, text));
    }

    /// One more element after another one.
    pub(in super::super) fn insert_after(&mut self, xml: &str, element: &Element, text: &str) {
        let line = xml[..element.whole.start].rsplit_once('\n').map(|(_, line)| line);
        let indent = line.filter(|line| line.trim().is_empty()).map(|line| format!("\n{line}")).unwrap_or_default();
        self.0.push((element.whole.end..element.whole.end, format!("{indent}{text}")));
    }

    /// An element that was `<empty/>` with something in it.
    fn open(&mut self, xml: &str, element: &Element, inner: &str) {
        let slash = xml[element.tag.clone()].rfind('/').map_or(element.tag.end, |slash| element.tag.start + slash);
        self.0.push((slash..element.tag.end, format!(">{inner}</{}>", element.name)));
    }

    /// The text with all of them made.
    pub(in super::super) fn apply(mut self, xml: &str) -> String {
        // Later ones first, so that earlier places stay where they are; of those at one place the first goes first.
        self.0.sort_by_key(|(range, _)| (range.start, range.end));
        let mut text = String::with_capacity(xml.len() + 1024);
        let mut at = 0;
        for (range, new) in self.0 {
            text.push_str(&xml[at..range.start]);
            text.push_str(&new);
            at = range.end;
        }
        text.push_str(&xml[at..]);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<?xml version='1.0'?>\n<!-- <a/> -->\n<domain type=\"kvm\" xmlns:q='u'>\n  <vcpu>4</vcpu>\n  <q:x a='>' />\n  \
        <devices>\n    <disk/><!-- x -->\n    <emulator>/bin/&amp;</emulator>\n  </devices>\n</domain>\n";

    #[test]
    fn each_part_knows_where_it_is() {
        let root = parse(XML).unwrap();
        assert_eq!(
            (root.name.as_str(), root.attribute(XML, "type"), root.attribute(XML, "xmlns:q")),
            ("domain", Some("kvm"), Some("u"))
        );
        assert_eq!(root.child("vcpu").unwrap().text(XML), "4");
        let foreign = root.child("q:x").unwrap();
        assert_eq!((&XML[foreign.whole.clone()], foreign.attribute(XML, "a")), ("<q:x a='>' />", Some(">")));
        assert_eq!(root.child("devices").unwrap().children.len(), 2);
    }

    #[test]
    fn only_what_is_changed_changes() {
        let root = parse(XML).unwrap();
        let mut edits = Edits::default();
        let vcpu = root.child("vcpu").unwrap();
        edits.set_text(XML, vcpu, "8");
        edits.set_attribute(vcpu, "current", "4");
        edits.set_attribute(&root, "type", "qemu");
        let devices = root.child("devices").unwrap();
        edits.append(XML, devices, "<memory/>");
        edits.append(XML, devices.child("disk").unwrap(), "<a/>");
        edits.insert_after(XML, vcpu, "<cpu/>");
        let expected = XML
            .replace("<vcpu>4</vcpu>", "<vcpu current='4'>8</vcpu>\n  <cpu/>")
            .replace("\"kvm\"", "\"qemu\"")
            .replace("<disk/>", "<disk><a/></disk>")
            .replace("</emulator>", "</emulator>\n    <memory/>");
        assert_eq!(edits.apply(XML), expected);
        assert_eq!(Edits::default().apply(XML), XML);
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        for xml in ["", "<a>", "</a>", "<a/><b/>", "<a b=c/>", "<a b='", &"<a>".repeat(300)] {
            assert!(parse(xml).is_err(), "{xml}");
        }
    }
}
