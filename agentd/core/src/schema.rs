//! OpenAPI schemas of the units, which derive can't write: they are numbers on the wire.

use std::borrow::Cow;

use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, OneOfBuilder, SchemaFormat, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::units::{Amount, ByteCount, Cpus, Limit};

impl PartialSchema for Cpus {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::Number)
            .minimum(Some(0))
            .description(Some("CPUs, exact to thousandths"))
            .into()
    }
}

impl ToSchema for Cpus {
    fn name() -> Cow<'static, str> {
        "Cpus".into()
    }
}

impl PartialSchema for ByteCount {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::Integer)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Int64)))
            .minimum(Some(0))
            .description(Some("bytes"))
            .into()
    }
}

impl ToSchema for ByteCount {
    fn name() -> Cow<'static, str> {
        "ByteCount".into()
    }
}

impl<T: PartialSchema> PartialSchema for Limit<T> {
    fn schema() -> RefOr<Schema> {
        let none = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["none"]));
        OneOfBuilder::new().item(T::schema()).item(none).into()
    }
}

impl<T: ToSchema> ToSchema for Limit<T> {
    fn name() -> Cow<'static, str> {
        format!("Limit_{}", T::name()).into()
    }
}

impl<T: PartialSchema> PartialSchema for Amount<T> {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("with a unit, or relative with a leading + or -"));
        OneOfBuilder::new().item(T::schema()).item(text).into()
    }
}

impl<T: ToSchema> ToSchema for Amount<T> {
    fn name() -> Cow<'static, str> {
        format!("Amount_{}", T::name()).into()
    }
}
