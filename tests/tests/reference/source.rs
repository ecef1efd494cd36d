//! What the source says of its types: names and doc comments of fields and variants, as serde writes them.

use std::collections::BTreeMap;
use syn::{Attribute, Expr, ExprLit, Fields, GenericArgument, Item, Lit, Meta, PathArguments, Type};

/// A field, or a variant.
#[derive(Debug)]
pub(crate) struct Member {
    /// As serde names it.
    pub(crate) name: String,
    pub(crate) doc: String,
    /// Of a field its type; of a variant nothing.
    pub(crate) kind: Option<Kind>,
    /// Of a variant the names of its fields.
    pub(crate) holds: Vec<String>,
    /// It may be left out.
    pub(crate) optional: bool,
}

/// A type, as far as a reader of a config must know it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    Plain(&'static str),
    List(Box<Kind>),
    Pair(Box<Kind>),
    /// One that is declared: a table, some words, or text of its own form.
    Named(String),
}

/// A declared type.
#[derive(Debug)]
pub(crate) struct Declared {
    pub(crate) doc: String,
    pub(crate) members: Vec<Member>,
    pub(crate) form: Form,
}

/// How a declared type is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Form {
    /// As a table of its fields.
    Table,
    /// As one of its variants' names.
    Words,
    /// As text that it reads itself.
    Text,
}

/// The types of some source files.
#[derive(Debug)]
pub(crate) struct Source(BTreeMap<String, Declared>);

impl Source {
    /// Reads source files, by their paths in the repository.
    pub(crate) fn read(files: &[&str]) -> Self {
        let items = files.iter().flat_map(|file| {
            let text = std::fs::read_to_string(super::at(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
            syn::parse_file(&text).unwrap_or_else(|error| panic!("{file}: {error}")).items
        });
        Self(items.filter_map(declared).collect())
    }

    /// A type that is declared in the files.
    pub(crate) fn get(&self, name: &str) -> &Declared {
        self.0.get(name).unwrap_or_else(|| panic!("the type {name} is declared in none of the files that are read: name its file"))
    }
}

fn declared(item: Item) -> Option<(String, Declared)> {
    match item {
        Item::Struct(item) => {
            let serde = serde(&item.attrs);
            let form = if derives_serialize(&item.attrs) { Form::Table } else { Form::Text };
            let Fields::Named(fields) = item.fields else {
                return Some((item.ident.to_string(), Declared { doc: doc(&item.attrs), members: Vec::new(), form: Form::Text }));
            };
            let fields = fields.named.into_iter().filter(|field| !is_skipped(&field.attrs));
            let members =
                fields.map(|field| member(&field.attrs, &field.ident.map(|i| i.to_string()).unwrap(), &field.ty, &serde)).collect();
            Some((item.ident.to_string(), Declared { doc: doc(&item.attrs), members, form }))
        }
        Item::Enum(item) => {
            let serde = serde(&item.attrs);
            let variants = item.variants.into_iter().map(|variant| {
                let own = self::serde(&variant.attrs);
                let name = own.get("rename").cloned().unwrap_or_else(|| renamed(&variant.ident.to_string(), serde.get("rename_all")));
                let holds = variant.fields.iter().filter_map(|field| Some(field.ident.as_ref()?.to_string())).collect();
                Member { name, doc: doc(&variant.attrs), kind: None, holds, optional: false }
            });
            let members = variants.collect();
            Some((item.ident.to_string(), Declared { doc: doc(&item.attrs), members, form: Form::Words }))
        }
        _ => None,
    }
}

fn member(attrs: &[Attribute], ident: &str, ty: &Type, container: &BTreeMap<String, String>) -> Member {
    let own = serde(attrs);
    let name = own.get("rename").cloned().unwrap_or_else(|| ident.trim_start_matches("r#").to_owned());
    let (kind, option) = kind(ty);
    let optional = option || own.contains_key("default") || container.contains_key("default");
    Member { name, doc: doc(attrs), kind: Some(kind), holds: Vec::new(), optional }
}

/// A type, and whether it is an option of it.
fn kind(ty: &Type) -> (Kind, bool) {
    if let Type::Array(array) = ty {
        return (Kind::Pair(Box::new(kind(&array.elem).0)), false);
    }
    let Type::Path(path) = ty else { return (Kind::Plain("table"), false) };
    let last = path.path.segments.last().unwrap();
    let inner = || match &last.arguments {
        PathArguments::AngleBracketed(list) => {
            list.args.iter().find_map(|a| if let GenericArgument::Type(t) = a { Some(kind(t).0) } else { None })
        }
        _ => None,
    };
    match last.ident.to_string().as_str() {
        "Option" => (inner().unwrap(), true),
        "Vec" => (Kind::List(Box::new(inner().unwrap())), false),
        "u8" | "u16" | "u32" | "u64" | "usize" => (Kind::Plain("integer"), false),
        "f32" | "f64" => (Kind::Plain("number"), false),
        "bool" => (Kind::Plain("true or false"), false),
        "String" | "str" => (Kind::Plain("text"), false),
        "PathBuf" => (Kind::Plain("path"), false),
        "Table" | "Map" | "BTreeMap" | "HashMap" => (Kind::Plain("table"), false),
        "Range" => (Kind::Plain("range"), false),
        "Digest" => (Kind::Plain("digest"), false),
        name => (Kind::Named(name.to_owned()), false),
    }
}

/// The doc comment, in one line, with links to items as the items' names.
fn doc(attrs: &[Attribute]) -> String {
    let lines = attrs.iter().filter_map(|attr| match &attr.meta {
        Meta::NameValue(pair) if pair.path.is_ident("doc") => text(&pair.value),
        _ => None,
    });
    let doc = lines.map(|line| line.trim().to_owned()).collect::<Vec<_>>().join(" ");
    doc.replace("[`", "`").replace("`]", "`").replace('|', "\\|")
}

fn text(value: &Expr) -> Option<String> {
    if let Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) = value { Some(text.value()) } else { None }
}

/// What stands in `#[serde(...)]`: names, and their values where they are text.
fn serde(attrs: &[Attribute]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("serde")) {
        attr.parse_nested_meta(|meta| {
            let name = meta.path.get_ident().map(ToString::to_string).unwrap_or_default();
            let value = if meta.input.peek(syn::Token![=]) { text(&meta.value()?.parse()?) } else { None };
            found.insert(name, value.unwrap_or_default());
            Ok(())
        })
        .unwrap();
    }
    found
}

fn is_skipped(attrs: &[Attribute]) -> bool {
    let serde = serde(attrs);
    serde.contains_key("skip") || serde.contains_key("flatten")
}

fn derives_serialize(attrs: &[Attribute]) -> bool {
    let mut found = false;
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("derive")) {
        attr.parse_nested_meta(|meta| {
            found |= meta.path.segments.last().is_some_and(|last| last.ident == "Serialize");
            Ok(())
        })
        .unwrap();
    }
    found
}

/// A variant's name by serde's rule.
fn renamed(name: &str, rule: Option<&String>) -> String {
    let apart = |between: char| {
        let mut text = String::new();
        for letter in name.chars() {
            if letter.is_uppercase() && !text.is_empty() {
                text.push(between);
            }
            text.extend(letter.to_lowercase());
        }
        text
    };
    match rule.map(String::as_str) {
        Some("lowercase") => name.to_lowercase(),
        Some("snake_case") => apart('_'),
        Some("kebab-case") => apart('-'),
        None => name.to_owned(),
        Some(rule) => panic!("serde's rule {rule} is not known here"),
    }
}
