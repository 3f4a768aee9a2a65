//! What a shipped binary must not hold.

/// Words of `src/sabotage`: what turns it on, and what is done.
const WORDS: [&str; 3] = ["DC_SABOTAGE", "skip-drain", "does wrong on purpose"];

#[test]
fn the_shipped_agent_cannot_be_told_to_do_wrong() -> std::io::Result<()> {
    if cfg!(feature = "sabotage") {
        return Ok(()); // whoever asks for it gets it
    }
    let agent = std::fs::read(env!("CARGO_BIN_EXE_dc-agent"))?;
    for word in WORDS {
        let held = agent.windows(word.len()).any(|part| part == word.as_bytes());
        assert!(!held, "the agent holds {word:?}");
    }
    Ok(())
}
