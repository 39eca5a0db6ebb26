//! The messages of an ONNX file (onnx 1.23, IR version 14), declared once.
//!
//! Each message is one entry of [`messages!`], which makes both the `prost` struct and the table of known fields that
//! [`super::scan`] walks a file with. Names and numbers are those of `onnx.proto`. Every optional scalar is an `Option`:
//! an absent field and a field that holds its default are different files. Byte fields are slices of the decoded
//! buffer. The members of a `oneof` are declared as separate optional fields, which is the same on the wire;
//! the importer refuses a message that sets two of them.

use bytes::Bytes;

/// A known field of a message.
pub struct Field {
    /// Its name in `onnx.proto`.
    pub name: &'static str,
    /// Its number.
    pub tag: u32,
    /// Whether the field takes part in decoding as a list of numbers, whose decoded size may exceed its length.
    pub numbers: bool,
    /// The table of the message it holds, when it holds one.
    pub inner: Option<fn() -> Table>,
}

/// The known fields of a message, and the bytes its decoded struct takes.
#[derive(Clone, Copy)]
pub struct Table {
    /// The fields, in order of declaration.
    pub fields: &'static [Field],
    /// The size of the struct in bytes.
    pub size: usize,
}

/// What the declared type of a field says about it.
pub trait Declared {
    /// The table of the message that the type holds.
    const INNER: Option<fn() -> Table> = None;
    /// Whether the type is a list of numbers.
    const NUMBERS: bool = false;
}

impl Declared for i32 {}
impl Declared for i64 {}
impl Declared for u64 {}
impl Declared for f32 {}
impl Declared for f64 {}
impl Declared for String {}
impl Declared for Bytes {}
impl<T: Declared> Declared for Option<T> {
    const INNER: Option<fn() -> Table> = T::INNER;
}
impl<T: Declared> Declared for Box<T> {
    const INNER: Option<fn() -> Table> = T::INNER;
}
impl<T: Declared + Scalar> Declared for Vec<T> {
    const INNER: Option<fn() -> Table> = T::INNER;
    const NUMBERS: bool = T::NUMBER;
}

/// Whether a list of this type is a list of numbers.
pub trait Scalar {
    /// True for numbers, false for text, bytes and messages.
    const NUMBER: bool;
}

macro_rules! scalars {
    ($number:literal: $($t:ty)*) => { $(impl Scalar for $t { const NUMBER: bool = $number; })* };
}
scalars!(true: i32 i64 u64 f32 f64);
scalars!(false: String Bytes);

/// Declares messages: `field: Type = number (prost attributes)`.
macro_rules! messages {
    ($( $(#[$doc:meta])* $name:ident { $( $field:ident: $ty:ty = $tag:tt ($($attr:tt)*), )* } )*) => { $(
        $(#[$doc])*
        #[derive(Clone, PartialEq, ::prost::Message)]
        #[allow(missing_docs)]
        pub struct $name {
            $( #[prost($($attr)*, tag = $tag)] pub $field: $ty, )*
        }

        impl $name {
            /// The known fields of this message.
            pub fn table() -> Table {
                static FIELDS: &[Field] = &[$( Field {
                    name: stringify!($field),
                    tag: $tag,
                    numbers: <$ty as Declared>::NUMBERS,
                    inner: <$ty as Declared>::INNER,
                }, )*];
                Table { fields: FIELDS, size: size_of::<$name>() }
            }
        }

        impl Declared for $name {
            const INNER: Option<fn() -> Table> = Some($name::table);
        }

        scalars!(false: $name);
    )* };
}

messages! {
    /// A whole file.
    ModelProto {
        ir_version: Option<i64> = 1 (int64, optional),
        producer_name: Option<String> = 2 (string, optional),
        producer_version: Option<String> = 3 (string, optional),
        domain: Option<String> = 4 (string, optional),
        model_version: Option<i64> = 5 (int64, optional),
        doc_string: Option<String> = 6 (string, optional),
        graph: Option<GraphProto> = 7 (message, optional),
        opset_import: Vec<OperatorSetIdProto> = 8 (message, repeated),
        metadata_props: Vec<StringStringEntryProto> = 14 (message, repeated),
        training_info: Vec<TrainingInfoProto> = 20 (message, repeated),
        functions: Vec<FunctionProto> = 25 (message, repeated),
        configuration: Vec<DeviceConfigurationProto> = 26 (message, repeated),
    }

    /// A graph: the model's, or one held in an attribute.
    GraphProto {
        node: Vec<NodeProto> = 1 (message, repeated),
        name: Option<String> = 2 (string, optional),
        initializer: Vec<TensorProto> = 5 (message, repeated),
        doc_string: Option<String> = 10 (string, optional),
        input: Vec<ValueInfoProto> = 11 (message, repeated),
        output: Vec<ValueInfoProto> = 12 (message, repeated),
        value_info: Vec<ValueInfoProto> = 13 (message, repeated),
        quantization_annotation: Vec<TensorAnnotation> = 14 (message, repeated),
        sparse_initializer: Vec<SparseTensorProto> = 15 (message, repeated),
        metadata_props: Vec<StringStringEntryProto> = 16 (message, repeated),
    }

    /// One application of an operator.
    NodeProto {
        input: Vec<String> = 1 (string, repeated),
        output: Vec<String> = 2 (string, repeated),
        name: Option<String> = 3 (string, optional),
        op_type: Option<String> = 4 (string, optional),
        attribute: Vec<AttributeProto> = 5 (message, repeated),
        doc_string: Option<String> = 6 (string, optional),
        domain: Option<String> = 7 (string, optional),
        overload: Option<String> = 8 (string, optional),
        metadata_props: Vec<StringStringEntryProto> = 9 (message, repeated),
        device_configurations: Vec<NodeDeviceConfigurationProto> = 10 (message, repeated),
    }

    /// A named attribute; `kind` is `AttributeProto.type`.
    AttributeProto {
        name: Option<String> = 1 (string, optional),
        f: Option<f32> = 2 (float, optional),
        i: Option<i64> = 3 (int64, optional),
        s: Option<Bytes> = 4 (bytes = "bytes", optional),
        t: Option<Box<TensorProto>> = 5 (message, optional, boxed),
        g: Option<Box<GraphProto>> = 6 (message, optional, boxed),
        floats: Vec<f32> = 7 (float, repeated, packed = "false"),
        ints: Vec<i64> = 8 (int64, repeated, packed = "false"),
        strings: Vec<Bytes> = 9 (bytes = "bytes", repeated),
        tensors: Vec<TensorProto> = 10 (message, repeated),
        graphs: Vec<GraphProto> = 11 (message, repeated),
        doc_string: Option<String> = 13 (string, optional),
        tp: Option<Box<TypeProto>> = 14 (message, optional, boxed),
        type_protos: Vec<TypeProto> = 15 (message, repeated),
        kind: Option<i32> = 20 (int32, optional),
        ref_attr_name: Option<String> = 21 (string, optional),
        sparse_tensor: Option<Box<SparseTensorProto>> = 22 (message, optional, boxed),
        sparse_tensors: Vec<SparseTensorProto> = 23 (message, repeated),
    }

    /// A dense tensor.
    TensorProto {
        dims: Vec<i64> = 1 (int64, repeated, packed = "false"),
        data_type: Option<i32> = 2 (int32, optional),
        segment: Option<Segment> = 3 (message, optional),
        float_data: Vec<f32> = 4 (float, repeated, packed = "true"),
        int32_data: Vec<i32> = 5 (int32, repeated, packed = "true"),
        string_data: Vec<Bytes> = 6 (bytes = "bytes", repeated),
        int64_data: Vec<i64> = 7 (int64, repeated, packed = "true"),
        name: Option<String> = 8 (string, optional),
        raw_data: Option<Bytes> = 9 (bytes = "bytes", optional),
        double_data: Vec<f64> = 10 (double, repeated, packed = "true"),
        uint64_data: Vec<u64> = 11 (uint64, repeated, packed = "true"),
        doc_string: Option<String> = 12 (string, optional),
        external_data: Vec<StringStringEntryProto> = 13 (message, repeated),
        data_location: Option<i32> = 14 (int32, optional),
        metadata_props: Vec<StringStringEntryProto> = 16 (message, repeated),
    }

    /// `TensorProto.Segment`: which part of a tensor a message holds.
    Segment {
        begin: Option<i64> = 1 (int64, optional),
        end: Option<i64> = 2 (int64, optional),
    }

    /// A sparse tensor: values and where they stand.
    SparseTensorProto {
        values: Option<TensorProto> = 1 (message, optional),
        indices: Option<TensorProto> = 2 (message, optional),
        dims: Vec<i64> = 3 (int64, repeated, packed = "false"),
    }

    /// A sequence in a file of its own; `kind` is `SequenceProto.elem_type`. Sequences of sparse tensors and of maps are
    /// left out.
    SequenceProto {
        name: Option<String> = 1 (string, optional),
        kind: Option<i32> = 2 (int32, optional),
        tensor_values: Vec<TensorProto> = 3 (message, repeated),
        sequence_values: Vec<SequenceProto> = 5 (message, repeated),
        optional_values: Vec<OptionalProto> = 7 (message, repeated),
    }

    /// An optional in a file of its own; `kind` is `OptionalProto.elem_type`. Sparse tensors and maps are left out.
    OptionalProto {
        name: Option<String> = 1 (string, optional),
        kind: Option<i32> = 2 (int32, optional),
        tensor_value: Option<TensorProto> = 3 (message, optional),
        sequence_value: Option<Box<SequenceProto>> = 5 (message, optional, boxed),
        optional_value: Option<Box<OptionalProto>> = 7 (message, optional, boxed),
    }

    /// The name and type of a value.
    ValueInfoProto {
        name: Option<String> = 1 (string, optional),
        kind: Option<TypeProto> = 2 (message, optional),
        doc_string: Option<String> = 3 (string, optional),
        metadata_props: Vec<StringStringEntryProto> = 4 (message, repeated),
    }

    /// A type; at most one of the fields but `denotation` is set.
    TypeProto {
        tensor_type: Option<TensorTypeProto> = 1 (message, optional),
        sequence_type: Option<Box<ElementTypeProto>> = 4 (message, optional, boxed),
        map_type: Option<Box<MapTypeProto>> = 5 (message, optional, boxed),
        denotation: Option<String> = 6 (string, optional),
        opaque_type: Option<OpaqueTypeProto> = 7 (message, optional),
        sparse_tensor_type: Option<TensorTypeProto> = 8 (message, optional),
        optional_type: Option<Box<ElementTypeProto>> = 9 (message, optional, boxed),
    }

    /// `TypeProto.Tensor` and `TypeProto.SparseTensor`.
    TensorTypeProto {
        elem_type: Option<i32> = 1 (int32, optional),
        shape: Option<TensorShapeProto> = 2 (message, optional),
    }

    /// `TypeProto.Sequence` and `TypeProto.Optional`.
    ElementTypeProto {
        elem_type: Option<TypeProto> = 1 (message, optional),
    }

    /// `TypeProto.Map`.
    MapTypeProto {
        key_type: Option<i32> = 1 (int32, optional),
        value_type: Option<TypeProto> = 2 (message, optional),
    }

    /// `TypeProto.Opaque`.
    OpaqueTypeProto {
        domain: Option<String> = 1 (string, optional),
        name: Option<String> = 2 (string, optional),
    }

    /// A shape.
    TensorShapeProto {
        dim: Vec<Dimension> = 1 (message, repeated),
    }

    /// One dim: a number, a name, or neither.
    Dimension {
        dim_value: Option<i64> = 1 (int64, optional),
        dim_param: Option<String> = 2 (string, optional),
        denotation: Option<String> = 3 (string, optional),
    }

    /// A domain and the version of its operators.
    OperatorSetIdProto {
        domain: Option<String> = 1 (string, optional),
        version: Option<i64> = 2 (int64, optional),
    }

    /// A model-local function.
    FunctionProto {
        name: Option<String> = 1 (string, optional),
        input: Vec<String> = 4 (string, repeated),
        output: Vec<String> = 5 (string, repeated),
        attribute: Vec<String> = 6 (string, repeated),
        node: Vec<NodeProto> = 7 (message, repeated),
        doc_string: Option<String> = 8 (string, optional),
        opset_import: Vec<OperatorSetIdProto> = 9 (message, repeated),
        domain: Option<String> = 10 (string, optional),
        attribute_proto: Vec<AttributeProto> = 11 (message, repeated),
        value_info: Vec<ValueInfoProto> = 12 (message, repeated),
        overload: Option<String> = 13 (string, optional),
        metadata_props: Vec<StringStringEntryProto> = 14 (message, repeated),
    }

    /// A key and its value.
    StringStringEntryProto {
        key: Option<String> = 1 (string, optional),
        value: Option<String> = 2 (string, optional),
    }

    /// Which tensors hold the quantization parameters of a tensor.
    TensorAnnotation {
        tensor_name: Option<String> = 1 (string, optional),
        quant_parameter_tensor_names: Vec<StringStringEntryProto> = 2 (message, repeated),
    }

    /// A training step.
    TrainingInfoProto {
        initialization: Option<GraphProto> = 1 (message, optional),
        algorithm: Option<GraphProto> = 2 (message, optional),
        initialization_binding: Vec<StringStringEntryProto> = 3 (message, repeated),
        update_binding: Vec<StringStringEntryProto> = 4 (message, repeated),
    }

    /// A set of devices to run on.
    DeviceConfigurationProto {
        name: Option<String> = 1 (string, optional),
        num_devices: Option<i32> = 2 (int32, optional),
        device: Vec<String> = 3 (string, repeated),
    }

    /// How a node is spread over the devices of a configuration.
    NodeDeviceConfigurationProto {
        configuration_id: Option<String> = 1 (string, optional),
        sharding_spec: Vec<ShardingSpecProto> = 2 (message, repeated),
        pipeline_stage: Option<i32> = 3 (int32, optional),
    }

    /// How one tensor is sharded.
    ShardingSpecProto {
        tensor_name: Option<String> = 1 (string, optional),
        device: Vec<i64> = 2 (int64, repeated, packed = "false"),
        index_to_device_group_map: Vec<IntIntListEntryProto> = 3 (message, repeated),
        sharded_dim: Vec<ShardedDimProto> = 4 (message, repeated),
    }

    /// A number and the numbers it stands for.
    IntIntListEntryProto {
        key: Option<i64> = 1 (int64, optional),
        value: Vec<i64> = 2 (int64, repeated, packed = "false"),
    }

    /// How one axis is sharded.
    ShardedDimProto {
        axis: Option<i64> = 1 (int64, optional),
        simple_sharding: Vec<SimpleShardedDimProto> = 2 (message, repeated),
    }

    /// One level of the sharding of an axis.
    SimpleShardedDimProto {
        dim_value: Option<i64> = 1 (int64, optional),
        dim_param: Option<String> = 2 (string, optional),
        num_shards: Option<i64> = 3 (int64, optional),
    }
}
