"""The same training in Lightning."""

from __future__ import annotations

import lightning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from framework_training import data, make, small_model


class Module(lightning.LightningModule):
    def __init__(self, attached=False, automatic=True, skip=None):
        super().__init__()
        self.model = small_model()
        self.attached = attached
        self.automatic_optimization = automatic
        self.skip = skip

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        if batch_idx == self.skip:
            return None
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()
            return None
        return loss

    def configure_optimizers(self):
        return make(self.model, self.attached)


def fit(module, tmp_path, epochs=1, ckpt_path=None, callbacks=(), **settings):
    if module.automatic_optimization:
        settings = {"gradient_clip_val": 0.5, **settings}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        default_root_dir=tmp_path,
        accelerator="cpu",
        log_every_n_steps=4,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **settings},
        callbacks=list(callbacks),
    )
    loader = DataLoader(TensorDataset(*data()), batch_size=8)
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer
