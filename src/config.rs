use crate::*;
pub struct Config {
    pub server: server::Options,
    pub gateway: gateway::Options,
    pub ledger: ledger::Options,
    pub store: store::Options,
    pub admin: admin::Options,
}
