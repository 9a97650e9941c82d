use super::*;
pub struct Libvirt;
impl Libvirt {
    pub fn new(_: String) -> Self {
        Libvirt
    }
}
#[async_trait]
impl Backend for Libvirt {
    fn kind(&self) -> Kind {
        Kind::Vm
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
