//! `cert`: a small authority of one's own. Talks to no agent; keep the authority's key offline.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Subcommand;
use dc_core::fail::{Exit, Fail};
use dc_wire::identity::Role;
use dc_wire::pki::{self, CaFiles, Order};
use serde_json::json;

use super::out::{Out, clean, envelope};

/// Of `cert`.
#[derive(Debug, Subcommand)]
pub(crate) enum Cert {
    /// Makes an authority: ca.pem for everybody, ca.key for nobody
    Init {
        /// Folder to make it in
        #[arg(long)]
        dir: PathBuf,
        /// Its trust domain, as in prod.example.org
        #[arg(long)]
        name: String,
        /// How long it is good
        #[arg(long, default_value_t = 3650)]
        days: u32,
    },
    /// Issues a certificate and its key
    Issue {
        /// Folder of the authority
        #[arg(long)]
        dir: PathBuf,
        /// agent, operator or viewer
        #[arg(long)]
        role: Role,
        /// The site of an agent; the person or script otherwise
        #[arg(long)]
        name: String,
        /// Host name in it; may be repeated
        #[arg(long, value_name = "HOST")]
        dns: Vec<String>,
        /// Address in it; may be repeated
        #[arg(long, value_name = "ADDRESS")]
        ip: Vec<IpAddr>,
        /// How long it is good [default: 90 for agents, 30 for others]
        #[arg(long)]
        days: Option<u32>,
        /// Folder to write to [default: the authority's]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Replace a pair of that name
        #[arg(long)]
        replace: bool,
    },
    /// Shows what a certificate says
    Show {
        /// Certificate, PEM
        file: PathBuf,
    },
}

impl Cert {
    pub(crate) fn run(self, out: &Out) -> Result<Exit, Fail> {
        match self {
            Self::Init { dir, name, days } => {
                let made = pki::init(&dir, &name, days)?;
                if out.human() {
                    out.print(&format!("authority   {}", made.cert.display()));
                    out.print(&format!("its key     {}    keep it offline", made.key.display()));
                    out.print(&format!(
                        "Next: dc-switch cert issue --dir {} --role agent --name SITE",
                        dir.display()
                    ));
                } else {
                    out.json(&envelope(json!(made)));
                }
                Ok(Exit::Done)
            }
            Self::Issue { dir, role, name, dns, ip, days, out: into, replace } => {
                let days = days.unwrap_or(if role == Role::Agent { 90 } else { 30 });
                let into = into.unwrap_or_else(|| dir.clone());
                let order = Order { role, name, dns, ips: ip, days, replace };
                issued(&pki::issue(&CaFiles::within(&dir), &into, &order)?, out);
                Ok(Exit::Done)
            }
            Self::Show { file } => Ok(show(&pki::show(&file)?, out)),
        }
    }
}

fn issued(pair: &pki::Issued, out: &Out) {
    if !out.human() {
        return out.json(&envelope(json!(pair)));
    }
    out.print(&format!("certificate {}", pair.cert.display()));
    out.print(&format!("its key     {}", pair.key.display()));
    out.print(&format!("names       {}", pair.identity));
    out.print(&format!("expires     {}", pair.expires));
}

/// Ends with 10 for a certificate that is not in force.
fn show(shown: &pki::Shown, out: &Out) -> Exit {
    if out.human() {
        let list = |list: &[String]| if list.is_empty() { "-".to_owned() } else { clean(&list.join(", ")) };
        let force =
            if shown.in_force { out.green("+ in force") } else { out.red("x NOT in force by this clock") };
        out.print(&format!("names       {}", list(&shown.uris)));
        out.print(&format!("hosts       {}", list(&shown.hosts)));
        out.print(&format!(
            "uses        {}",
            if shown.authority { "authority".to_owned() } else { list(&shown.uses) }
        ));
        out.print(&format!("serial      {}", shown.serial));
        out.print(&format!("good        {} to {}", shown.starts, shown.expires));
        out.print(&format!("            {force}"));
    } else {
        out.json(&envelope(json!(shown)));
    }
    if shown.in_force { Exit::Done } else { Exit::Findings }
}
