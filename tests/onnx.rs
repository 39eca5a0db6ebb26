//! ONNX in and out: models that cannot be read say why, mutated ones never panic, and what is written is what was
//! read, as an independent reader sees it.

use onnx_protobuf::{
    AttributeProto, GraphProto, Message, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
};
use onnx_protobuf::{StringStringEntryProto, ValueInfoProto};
use qcc::onnx::error::Warning;
use qcc::onnx::{export, import};
use rand::{Rng, RngExt, SeedableRng};
use std::fs;
use std::path::{Path, PathBuf};

/// The models to test with: those in `QCC_MODELS`, or none, said.
fn models() -> Vec<PathBuf> {
    let Ok(root) = std::env::var("QCC_MODELS") else {
        eprintln!("QCC_MODELS is not set: skipped");
        return Vec::new();
    };
    let names = [
        "tinylm/model.onnx",
        "mnist/mnist.onnx",
        "magika/standard_v3_3.onnx",
        "nano_sort_gpt/legacy_sdpa_op17.onnx",
        "nano_sort_gpt/dynamo_sdpa_op18.onnx",
        "resnet20/resnet20.onnx",
        "silero_vad/silero_vad.onnx",
        "stories260k/model.onnx",
        "stories260k/dynamo_eager_op18.onnx",
        "stories260k/dynamo_sdpa_op18.onnx",
        "stories260k/dynamo_sdpa_op23.onnx",
    ];
    names.iter().map(|name| Path::new(&root).join(name)).collect()
}

fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    let mut node = NodeProto::new();
    node.op_type = op.into();
    node.name = format!("the {op}");
    node.input = inputs.iter().map(|s| s.to_string()).collect();
    node.output = outputs.iter().map(|s| s.to_string()).collect();
    node
}

fn values(names: &[&str]) -> Vec<ValueInfoProto> {
    let named = |name: &&str| {
        let mut v = ValueInfoProto::new();
        v.name = name.to_string();
        v
    };
    names.iter().map(named).collect()
}

fn graph(inputs: &[&str], nodes: Vec<NodeProto>, outputs: &[&str]) -> GraphProto {
    let mut graph = GraphProto::new();
    graph.name = "g".into();
    graph.input = values(inputs);
    graph.output = values(outputs);
    graph.node = nodes;
    graph
}

fn model(graph: GraphProto) -> ModelProto {
    let mut model = ModelProto::new();
    model.ir_version = 10;
    let mut opset = OperatorSetIdProto::new();
    opset.version = 21;
    model.opset_import.push(opset);
    model.graph = Some(graph).into();
    model
}

fn tensor(name: &str, dims: &[i64], data: &[u8]) -> TensorProto {
    let mut t = TensorProto::new();
    t.name = name.into();
    t.data_type = 1;
    t.dims = dims.to_vec();
    t.raw_data = data.to_vec();
    t
}

fn external(name: &str, dims: &[i64], entries: &[(&str, &str)]) -> TensorProto {
    let mut t = tensor(name, dims, &[]);
    t.data_location = onnx_protobuf::tensor_proto::DataLocation::EXTERNAL.into();
    for (key, value) in entries {
        let mut e = StringStringEntryProto::new();
        e.key = key.to_string();
        e.value = value.to_string();
        t.external_data.push(e);
    }
    t
}

fn weights(tensors: Vec<TensorProto>) -> ModelProto {
    let mut g = graph(&["x"], vec![node("Add", &["x", "w"], &["y"])], &["y"]);
    g.initializer = tensors;
    model(g)
}

/// What reading a model answers, as text.
fn refusal(model: &ModelProto) -> String {
    match import::from_bytes(model.write_to_bytes().unwrap().into()) {
        Ok(_) => "no error".to_owned(),
        Err(e) => e.to_string(),
    }
}

/// The same for a model in a folder.
fn refusal_in(folder: &Path, model: &ModelProto) -> String {
    let path = folder.join("m.onnx");
    fs::write(&path, model.write_to_bytes().unwrap()).unwrap();
    match import::read(&path) {
        Ok(_) => "no error".to_owned(),
        Err(e) => e.to_string().replace(&folder.display().to_string(), "DIR"),
    }
}

#[test]
fn what_is_written_is_what_was_read() {
    for path in models() {
        let before = ModelProto::parse_from_bytes(&fs::read(&path).unwrap()).unwrap();
        let imported = import::read(&path).unwrap();
        assert_eq!(imported.warnings, [], "{}", path.display());
        let after = export::to_bytes(&imported.module).unwrap();
        assert!(ModelProto::parse_from_bytes(&after).unwrap() == before, "{} differs", path.display());
    }
}

#[test]
fn graphs_that_are_no_graphs_are_refused() {
    let refuse = |nodes| refusal(&model(graph(&["x"], nodes, &["y"])));
    let relu = node("Relu", &["x"], &["y"]);
    assert_eq!(refuse(vec![relu.clone()]), "no error");
    assert_eq!(
        refuse(vec![node("Add", &["x", "nowhere"], &["y"])]),
        r#"model: node "the Add" (Add): uses "nowhere", which nothing in the model defines"#
    );
    assert_eq!(
        refuse(vec![node("Neg", &["a"], &["y"]), node("Relu", &["x"], &["a"])]),
        "model: node \"the Neg\" (Neg): uses \"a\" before it is defined: \
         expected its producer earlier in the graph, found node \"the Relu\" (Relu) later"
    );
    assert_eq!(
        refuse(vec![
            node("Add", &["x", "b"], &["a"]),
            node("Neg", &["a"], &["c"]),
            node("Abs", &["c"], &["b"])
        ]),
        "model: node \"the Add\" (Add): the nodes form a cycle: \
         node \"the Add\" (Add) -> node \"the Neg\" (Neg) -> node \"the Abs\" (Abs) -> node \"the Add\" (Add)"
    );
    assert_eq!(
        refuse(vec![node("Add", &["x", "y"], &["y"])]),
        "model: node \"the Add\" (Add): the nodes form a cycle: \
         node \"the Add\" (Add) -> node \"the Add\" (Add)"
    );
    assert_eq!(
        refuse(vec![relu.clone(), node("Neg", &["x"], &["y"])]),
        r#"model: node "the Neg" (Neg): two producers of "y": node "the Relu" (Relu) and node "the Neg" (Neg)"#
    );
    assert_eq!(
        refuse(vec![node("Relu", &["x"], &["x"])]),
        r#"model: node "the Relu" (Relu): two producers of "x": an input or a constant and node "the Relu" (Relu)"#
    );
    assert_eq!(
        refuse(vec![node("Split", &["x"], &["y", "y"])]),
        r#"model: node "the Split" (Split): two producers of "y": node "the Split" (Split) and node "the Split" (Split)"#
    );
    assert_eq!(
        refusal(&model(graph(&["x"], vec![], &["z"]))),
        r#"model: output 0 of the graph "g": uses "z", which nothing in the model defines"#
    );
    assert_eq!(refusal(&ModelProto::new()), "model: expected a graph, found none");
}

#[test]
fn faults_in_nested_graphs_are_named_there() {
    let attribute = |body: GraphProto| {
        let mut a = AttributeProto::new();
        a.name = "then_branch".into();
        a.type_ = onnx_protobuf::attribute_proto::AttributeType::GRAPH.into();
        a.g = Some(body).into();
        let mut n = node("If", &["x"], &["y"]);
        n.attribute.push(a);
        n
    };
    let inner = || graph(&[], vec![node("Neg", &["later"], &["z"])], &["z"]);
    assert_eq!(
        refusal(&model(graph(&["x"], vec![attribute(inner())], &["y"]))),
        r#"model: node "the Neg" (Neg): uses "later", which nothing in the model defines"#
    );
    assert_eq!(
        refusal(&model(graph(&["x"], vec![attribute(inner()), node("Relu", &["x"], &["later"])], &["y"]))),
        "model: node \"the Neg\" (Neg): uses \"later\" before it is defined: \
         expected its producer earlier in the graph, found node \"the Relu\" (Relu) later"
    );
    assert_eq!(
        refusal(&model(graph(&["x"], vec![attribute(inner()), node("Relu", &["y"], &["later"])], &["y"]))),
        "model: node \"the Neg\" (Neg): the nodes form a cycle: \
         node \"the If\" (If) -> node \"the Relu\" (Relu) -> node \"the If\" (If)"
    );
    // Nested deeper than a reader should follow.
    let mut deep = graph(&[], vec![], &[]);
    for _ in 0..40 {
        deep = graph(&[], vec![attribute(deep)], &[]);
    }
    let deep = refusal(&model(deep));
    assert!(deep.contains("nests deeper than 100 messages"), "{deep}");
}

#[test]
fn tensors_that_contradict_themselves_are_refused() {
    let refuse = |t| refusal(&weights(vec![t]));
    assert_eq!(refuse(tensor("w", &[2], &[0; 8])), "no error");
    assert_eq!(refuse(tensor("w", &[2], &[0; 7])), r#"model: tensor "w": expected 8 bytes of data, found 7"#);
    let huge = refuse(tensor("w", &[1 << 40, 1 << 40], &[0; 8]));
    assert!(huge.starts_with(r#"model: tensor "w": the shape"#), "{huge}");
    let huge = refuse(tensor("w", &[1 << 62], &[0; 8]));
    assert!(huge.starts_with(r#"model: tensor "w": "#), "{huge}");
    assert_eq!(
        refuse(tensor("w", &[-1], &[0; 4])),
        r#"model: tensor "w": expected dims of at least 0, found [-1]"#
    );
    let mut odd = tensor("w", &[1], &[0; 4]);
    odd.data_type = 99;
    assert_eq!(refuse(odd), r#"model: tensor "w": expected a known element type, found 99"#);
    let mut both = tensor("w", &[1], &[0; 4]);
    both.float_data.push(1.0);
    assert_eq!(
        refuse(both),
        r#"model: tensor "w": expected data in one field, found it in float_data and raw_data"#
    );
    let mut wrong = tensor("w", &[1], &[]);
    wrong.int64_data.push(1);
    assert_eq!(
        refuse(wrong.clone()),
        r#"model: tensor "w": expected the data of f32 elements in float_data, found it in int64_data"#
    );
    wrong.int64_data.clear();
    wrong.int32_data.push(300);
    wrong.data_type = 3;
    assert_eq!(refuse(wrong), r#"model: tensor "w": int32_data holds 300, which is no i8"#);
    assert_eq!(
        refusal(&weights(vec![tensor("w", &[0], &[]), tensor("w", &[0], &[])])),
        r#"model: tensor "w": constant "w" occurs twice"#
    );
}

#[test]
fn external_data_stays_in_the_models_folder() {
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().join("model");
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(outer.path().join("secret"), [0; 64]).unwrap();
    fs::write(dir.join("data"), (0..64).collect::<Vec<u8>>()).unwrap();
    fs::write(dir.join("sub/data"), [7; 8]).unwrap();
    let with = |entries: &[(&str, &str)]| refusal_in(&dir, &weights(vec![external("w", &[2], entries)]));
    assert_eq!(with(&[("location", "data")]), "no error");
    assert_eq!(with(&[("location", "data"), ("offset", "56"), ("length", "8")]), "no error");
    assert_eq!(with(&[("location", "./sub/data")]), "no error");
    let start = r#"DIR/m.onnx: tensor "w": "#;
    for (entries, reason) in [
        (&[("offset", "0")][..], "external data without a location"),
        (
            &[("location", "data"), ("offset", "57")],
            r#"external data at "data": expected 8 bytes at offset 57, found 64 in the file"#,
        ),
        (
            &[("location", "data"), ("offset", "18446744073709551615")],
            r#"external data at "data": expected 8 bytes at offset 18446744073709551615, found 64 in the file"#,
        ),
        (&[("location", "data"), ("length", "4")], "expected 8 bytes of data, found 4"),
        (&[("location", "data"), ("offset", "-1")], r#"external data offset "-1" is not a number of bytes"#),
        (&[("location", "../secret")], r#"external data at "../secret" lies outside the model's folder"#),
        (
            &[("location", "sub/../../secret")],
            r#"external data at "sub/../../secret" lies outside the model's folder"#,
        ),
        (&[("location", "sub")], r#"external data at "sub" is not a regular file"#),
        (
            &[("location", "/etc/passwd")],
            r#"external data at "/etc/passwd": expected a path relative to the model, found an absolute one"#,
        ),
    ] {
        assert_eq!(with(entries), format!("{start}{reason}"));
    }
    let missing = with(&[("location", "none")]);
    assert!(missing.starts_with(&format!(r#"{start}external data at "none" cannot be read: "#)), "{missing}");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("../secret", dir.join("link")).unwrap();
        std::os::unix::fs::symlink(outer.path(), dir.join("up")).unwrap();
        std::os::unix::fs::symlink("sub/data", dir.join("inside")).unwrap();
        let outside = |at: &str| format!("{start}external data at {at:?} lies outside the model's folder");
        assert_eq!(with(&[("location", "link")]), outside("link"));
        assert_eq!(with(&[("location", "up/secret")]), outside("up/secret"));
        assert_eq!(with(&[("location", "inside")]), "no error");
    }
    // What is read is what the file holds.
    fs::write(
        dir.join("m.onnx"),
        weights(vec![external("w", &[2], &[("location", "data"), ("offset", "3")])])
            .write_to_bytes()
            .unwrap(),
    )
    .unwrap();
    let imported = import::read(&dir.join("m.onnx")).unwrap();
    assert_eq!(imported.files, [dir.join("m.onnx"), fs::canonicalize(dir.join("data")).unwrap()]);
    let read = imported.module.consts.values().next().unwrap().read().unwrap();
    assert_eq!(read, [3, 4, 5, 6, 7, 8, 9, 10].as_slice());
}

#[test]
fn a_file_that_is_no_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.onnx");
    let mut noise = [0u8; 100];
    for seed in 0..100 {
        rand_chacha::ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut noise);
        fs::write(&path, noise).unwrap();
        let error = import::read(&path).unwrap_err().to_string();
        assert!(error.starts_with(&path.display().to_string()), "{error}");
    }
    fs::write(&path, "").unwrap();
    assert!(import::read(&path).unwrap_err().to_string().ends_with("expected a graph, found none"));
    let error = import::read(dir.path()).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}

#[test]
fn a_newer_onnx_is_warned_of() {
    let mut m = weights(vec![tensor("w", &[1], &[0; 4])]);
    m.ir_version = 15;
    m.opset_import[0].version = 29;
    let mut bytes = m.write_to_bytes().unwrap();
    bytes.extend([0xf8, 0x01, 1]); // field 31 of the model
    let imported = import::from_bytes(bytes.into()).unwrap();
    let unknown = Warning::UnknownField { path: "#31".into(), times: 1 };
    assert_eq!(imported.warnings, [unknown, Warning::NewerIr(15), Warning::NewerOpset(29)]);
    assert_eq!(imported.module.opset("onnx"), 29);
}

#[test]
fn large_tensors_go_to_an_aligned_sidecar() {
    let dir = tempfile::tempdir().unwrap();
    let data = |n: usize, seed: usize| (0..4 * n).map(|i| (i * 7 + seed) as u8).collect::<Vec<u8>>();
    let sizes = [10, 2000, 1024, 20_000, 16_384, 1023];
    let tensors =
        sizes.iter().enumerate().map(|(i, &n)| tensor(&format!("w{i}"), &[n as i64], &data(n, i))).collect();
    let mut m = weights(tensors);
    m.graph.mut_or_insert_default().node[0].input[1] = "w0".into();
    let imported = import::from_bytes(m.write_to_bytes().unwrap().into()).unwrap();
    let path = dir.path().join("out.onnx");
    let options = export::Options { external_data: true, ..Default::default() };
    let mut told = (0, 0);
    let written =
        export::write(&imported.module, &path, &options, &mut |done, total| told = (done, total)).unwrap();
    assert_eq!(written.0.iter().map(|f| f.1).sum::<u64>(), told.0);
    assert_eq!(told.0, told.1);
    let file = fs::read(dir.path().join("out.onnx.data")).unwrap();
    assert_eq!(written.0[1], (dir.path().join("out.onnx.data"), file.len() as u64));
    let out = ModelProto::parse_from_bytes(&fs::read(&path).unwrap()).unwrap();
    for (i, (t, &n)) in out.graph.initializer.iter().zip(&sizes).enumerate() {
        if 4 * n < 4096 {
            assert_eq!(t.raw_data, data(n, i));
            continue;
        }
        let entry = |key: &str| t.external_data.iter().find(|e| e.key == key).unwrap().value.clone();
        let (offset, length): (usize, usize) =
            (entry("offset").parse().unwrap(), entry("length").parse().unwrap());
        assert_eq!((entry("location").as_str(), length), ("out.onnx.data", 4 * n));
        assert_eq!(offset % if length >= 1 << 16 { 1 << 16 } else { 1 << 12 }, 0);
        assert_eq!(file[offset..offset + length], data(n, i));
    }
    // Read again and written in one piece, it is the model it was.
    let again = import::read(&path).unwrap();
    assert_eq!(again.files.len(), 2);
    let inputs = again.files.clone();
    let whole = ModelProto::parse_from_bytes(&export::to_bytes(&again.module).unwrap()).unwrap();
    assert!(whole == m);
    // Neither the model nor its data may be overwritten by what is written from them.
    let options = export::Options { external_data: true, inputs };
    let error = export::write(&again.module, &path, &options, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("is also an input"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// Nothing is put beside a device or a pipe: all of the model goes into it.
#[cfg(unix)]
#[test]
fn no_sidecar_beside_what_is_no_plain_file() {
    let mut m = weights(vec![tensor("w0", &[2000], &[7; 8000])]);
    m.graph.mut_or_insert_default().node[0].input[1] = "w0".into();
    let imported = import::from_bytes(m.write_to_bytes().unwrap().into()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("out.onnx");
    std::os::unix::fs::symlink("/dev/null", &link).unwrap();
    let options = export::Options { external_data: true, ..Default::default() };
    let written = export::write(&imported.module, &link, &options, &mut |_, _| {}).unwrap();
    assert_eq!(written.0.len(), 1);
    assert!(written.0[0].1 > 8000);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Lists a hundred thousand long, of every sort, take no time that grows with their square.
#[test]
fn long_lists_do_not_hang() {
    let names: Vec<String> = (0..100_000).map(|i| format!("v{i}")).collect();
    let refs: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut g = graph(&["x"], vec![node("Split", &["x"], &refs)], &refs);
    g.value_info = values(&["stray"; 100_000]);
    g.value_info.extend(values(&refs));
    let big = model(g).write_to_bytes().unwrap();
    let start = std::time::Instant::now();
    let imported = import::from_bytes(big.into()).unwrap();
    let after = ModelProto::parse_from_bytes(&export::to_bytes(&imported.module).unwrap()).unwrap();
    assert_eq!(after.graph.value_info.len(), 200_000);
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    let mut many = node("Relu", &["x"], &["y"]);
    many.attribute =
        names.iter().map(|n| AttributeProto { name: n.clone(), i: 1, ..Default::default() }).collect();
    let error = refusal(&model(graph(&["x"], vec![many], &["y"])));
    assert_eq!(error, "model: node \"the Relu\" (Relu): expected at most 4096 attributes, found 100000");
}

/// Ten thousand damaged models: each is read or refused, and what was read can be written.
#[test]
fn mutations_never_panic() {
    for path in models().into_iter().filter(|p| p.ends_with("nano_sort_gpt/legacy_sdpa_op17.onnx")) {
        let original = fs::read(&path).unwrap();
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut read = 0;
        for round in 0..10_000 {
            let mut bytes = original.clone();
            match round % 4 {
                // Bits, bytes, a cut, a part copied over another.
                0 => {
                    for _ in 0..rng.random_range(1..8) {
                        let at = rng.random_range(0..bytes.len());
                        bytes[at] ^= 1 << rng.random_range(0..8);
                    }
                }
                1 => {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] = rng.random();
                }
                2 => {
                    bytes.truncate(rng.random_range(0..bytes.len()));
                }
                _ => {
                    let len = rng.random_range(1..200);
                    let (from, to) =
                        (rng.random_range(0..bytes.len() - len), rng.random_range(0..bytes.len() - len));
                    bytes.copy_within(from..from + len, to);
                }
            }
            if let Ok(imported) = import::from_bytes(bytes.into()) {
                read += 1;
                let written = export::to_bytes(&imported.module).unwrap();
                if round % 10 == 0 {
                    let again = import::from_bytes(written.clone().into()).unwrap();
                    assert!(export::to_bytes(&again.module).unwrap() == written, "round {round}");
                }
            }
        }
        // Most of the file is weights, so many mutations leave a model; and many do not.
        assert!((1000..9000).contains(&read), "{read} of 10000 were read");
    }
}
