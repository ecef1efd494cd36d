//! The token that a coordinator may ask for, as commands take it and pass it on.

use std::path::PathBuf;

use clap::Args;
use ella_proto::access::{Access, Token};

use crate::ui::Fail;

#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TokenFile {
    /// The file of the token that the coordinator asks for; one that is started here then asks for it
    #[arg(long, value_name = "PATH", env = "ELLA_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

impl TokenFile {
    /// The token, if a file was given.
    pub(crate) fn load(&self) -> Result<Option<Token>, Fail> {
        Ok(self.token_file.as_deref().map(Token::load).transpose()?)
    }

    /// How the coordinator at this address is reached.
    pub(crate) fn access(&self, url: &str) -> Result<Access, Fail> {
        Ok(Access { url: url.to_owned(), token: self.load()? })
    }

    /// What a process that is started here is told: where the secret is, for its arguments are anyone's to read.
    pub(crate) fn arguments(&self) -> Vec<String> {
        self.token_file.iter().flat_map(|path| ["--token-file".to_owned(), path.display().to_string()]).collect()
    }
}
