use super::*;
pub struct Docker;
impl Docker {
    pub fn new(_: std::path::PathBuf) -> Self {
        Docker
    }
}
#[async_trait]
impl Backend for Docker {
    fn kind(&self) -> Kind {
        Kind::Container
    }
    fn name(&self) -> String {
        String::new()
    }
    async fn health(&self) -> Result<String, BackendError> {
        Err(BackendError::Unavailable("stub".into()))
    }
    async fn list(&self) -> Result<Vec<Observed>, BackendError> {
        Err(BackendError::Unavailable("stub".into()))
    }
    async fn observe(&self, _: &str, _: Look) -> Result<Observed, BackendError> {
        Err(BackendError::Unavailable("stub".into()))
    }
    async fn apply(&self, _: &Ref, _: &Identity, _: &Action) -> Result<(), BackendError> {
        Err(BackendError::Unavailable("stub".into()))
    }
}
