//! The agent that can be told to do wrong: for the lab alone, built with the feature `sabotage`.

#[path = "dc-agent.rs"]
mod agent;

fn main() -> std::process::ExitCode {
    agent::main()
}
