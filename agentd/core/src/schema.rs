//! OpenAPI schemas that derive can't write: the units, which are numbers on the wire, and the table of codes.
//!
//! `ComposeSchema` is what utoipa's derive asks of the parameters of a generic type (`FieldView<Cpus>`), and the blanket
//! impls of `PartialSchema` and `ToSchema` stand on it; it is hidden in utoipa's documents (seen in 6.0).

use std::borrow::Cow;

use utoipa::__dev::ComposeSchema;
use utoipa::ToSchema;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, OneOfBuilder, SchemaFormat, Type};
use utoipa::openapi::{RefOr, Schema};

use crate::error::Code;
use crate::units::{Amount, ByteCount, Cpus, Limit};

type Composed = Vec<RefOr<Schema>>;

impl ComposeSchema for Cpus {
    fn compose(_: Composed) -> RefOr<Schema> {
        let builder = ObjectBuilder::new().schema_type(Type::Number).minimum(Some(0));
        builder.description(Some("CPUs, exact to thousandths")).into()
    }
}

impl ComposeSchema for ByteCount {
    fn compose(_: Composed) -> RefOr<Schema> {
        let format = SchemaFormat::KnownFormat(KnownFormat::Int64);
        let builder = ObjectBuilder::new().schema_type(Type::Integer).format(Some(format)).minimum(Some(0));
        builder.description(Some("bytes")).into()
    }
}

impl<T: ToSchema> ComposeSchema for Limit<T> {
    fn compose(_: Composed) -> RefOr<Schema> {
        let none = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["none"]));
        OneOfBuilder::new().item(T::schema()).item(none).into()
    }
}

impl<T: ToSchema> ComposeSchema for Amount<T> {
    fn compose(_: Composed) -> RefOr<Schema> {
        let text = ObjectBuilder::new().schema_type(Type::String);
        let text = text.description(Some("with a unit, or relative with a leading + or -"));
        OneOfBuilder::new().item(T::schema()).item(text).into()
    }
}

impl ComposeSchema for Code {
    fn compose(_: Composed) -> RefOr<Schema> {
        let names = Code::ALL.iter().map(|code| code.as_str());
        ObjectBuilder::new().schema_type(Type::String).enum_values(Some(names)).into()
    }
}

impl ToSchema for Code {
    fn name() -> Cow<'static, str> {
        "Code".into()
    }
}

impl ToSchema for Cpus {
    fn name() -> Cow<'static, str> {
        "Cpus".into()
    }
}

impl ToSchema for ByteCount {
    fn name() -> Cow<'static, str> {
        "ByteCount".into()
    }
}

impl<T: ToSchema> ToSchema for Limit<T> {
    fn name() -> Cow<'static, str> {
        format!("Limit_{}", T::name()).into()
    }
}

impl<T: ToSchema> ToSchema for Amount<T> {
    fn name() -> Cow<'static, str> {
        format!("Amount_{}", T::name()).into()
    }
}
