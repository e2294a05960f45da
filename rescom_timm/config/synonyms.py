"""Names of keys and methods in other libraries (ultralytics, transformers, timm), to suggest ours."""

from __future__ import annotations

_KEYS = {
    "data.source": "dataset dataset_name dataset_path data_dir data_path train_dir image_folder "
    "image_dir img_dir images root",
    "data.train": "train_split split",
    "data.test": "test_split test_dir",
    "data.subset": "dataset_config_name config_name",
    "data.image_column": "image_column_name input_key",
    "data.label_column": "label_column_name target_key",
    "data.validation": "val valid val_split validation_split val_dir validation_dir",
    "data.validation=holdout(0.1)": "val_fraction train_val_split",
    "data.index=FILE": "train_file train_csv csv csv_file label_file labels annotations ann_file split_file",
    "data.test_index": "test_file test_csv",
    "data.index=exponential(100)": "imbalance imbalance_factor imb_factor imbalance_ratio imb_ratio long_tail",
    "evaluation.batch_size": "per_device_eval_batch_size eval_batch_size validation_batch_size val_batch_size",
    "evaluation.every": "eval_strategy evaluation_strategy eval_interval "
    "val_interval check_val_every_n_epoch eval_freq val_freq",
    "evaluation.select": "metric metric_for_best_model eval_metric monitor",
    "evaluation.patience": "early_stopping early_stopping_patience",
    "checkpoint.every": "save_strategy save_period save_interval save_every save_freq checkpoint_interval "
    "checkpoint_freq",
    "checkpoint.keep": "save_total_limit checkpoint_hist keep_checkpoints",
    "output": "output_dir out_dir save_dir log_dir logdir logging_dir work_dir project_dir",
    "name": "run_name exp_name experiment experiment_name",
    "from": "init_checkpoint initial_checkpoint load_from finetune ckpt ckpt_path resume_from pretrain",
    "seed": "random_seed manual_seed random_state",
    "net.backbone": "model arch architecture model_name model_name_or_path backbone_name encoder network",
    "net.pretrained": "use_pretrained",
    "net.weights_file": "weights_path pretrained_path",
    "net.trainable": "freeze freeze_backbone frozen unfreeze freeze_layers",
    "net.tuning.name=lora": "lora peft use_lora",
    "net.tuning.name=adaptformer": "adapter adapters",
    "net.tuning.name": "finetuning",
    "net.options": "model_kwargs",
    "net.projector.dim": "feature_dim feat_dim embed_dim proj_dim projection_dim embedding_dim",
    "net.projector.hidden": "hidden_dim hidden_size mlp_dim",
    "net.options.drop_path_rate": "drop_path",
    "net.options.drop_rate": "dropout drop",
    "method.queue.per_class": "q queue_per_class",
    "method.temperature": "t temp",
    "method.contrast_weight": "lambda lam contrastive_weight supcon_weight",
    "method.teacher": "distill kd kd_model_name teacher_model",
    "method.gamma": "focal_gamma",
    "method.margin": "max_m ldam_margin",
    "method.name": "loss criterion loss_name loss_function loss_fn algorithm",
    "method.name=class_balanced": "class_weights class_weight cls_weights weighted weighted_loss balanced pos_weight",
    "loader.sampler": "weighted_sampler class_balanced_sampling balanced_sampler oversample oversampling resampling",
    "optimizer.name": "opt optim optimiser opt_name optim_name",
    "optimizer.lr": "lr0 learning_rate base_lr lr_base max_lr peak_lr learningrate",
    "optimizer.weight_decay": "wd decay l2 weightdecay",
    "optimizer.clip_norm": "max_grad_norm clip_grad grad_clip gradient_clip_val clip_grad_norm gradient_clipping clip",
    "optimizer.sam={rho: 0.1}": "sam use_sam sharpness_aware",
    "optimizer.sam.rho": "rho sam_rho",
    "optimizer.sam.adaptive": "asam",
    "schedule.name": "sched scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "schedule.name=cosine": "cos_lr cosine cosine_lr",
    "schedule.name=steps": "step_lr multistep multi_step",
    "schedule.by=update": "sched_on_updates",
    "schedule.final": "lrf min_lr final_lr eta_min",
    "schedule.gamma": "decay_rate lr_decay lr_gamma lr_decay_rate",
    "schedule.warmup_epochs": "warmup warm_up",
    "schedule.milestones": "decay_milestones decay_epochs lr_steps lr_milestones step_size",
    "train.epochs": "epoch num_epochs num_train_epochs max_epochs n_epochs nepochs total_epochs",
    "train.epochs=EPOCHS": "max_steps steps iters iterations max_iter total_steps train_steps t_max",
    "schedule.warmup_epochs=EPOCHS": "warmup_steps warmup_ratio warmup_iters",
    "evaluation.every=EPOCHS": "eval_steps",
    "checkpoint.every=EPOCHS": "save_steps",
    "train.batch_size": "batch_size batch bs b batchsize per_device_train_batch_size train_batch_size total_batch_size",
    "train.accumulate": "gradient_accumulation_steps grad_accum_steps grad_accum accumulation_steps accum_iter "
    "accumulate_grad_batches nbs",
    "train.precision": "amp mixed_precision amp_dtype dtype model_dtype",
    "train.precision=fp16": "fp16 half",
    "train.precision=bf16": "bf16",
    "train.ema={decay: 0.9999}": "model_ema use_ema ema",
    "train.ema.decay": "ema_decay model_ema_decay ema_momentum",
    "train.ema.warmup": "model_ema_warmup",
    "train.fit_batch": "auto_find_batch_size autobatch",
    "mix.mixup": "mixup_alpha mix_up",
    "mix.cutmix": "cutmix_alpha cut_mix",
    "mix.probability": "mixup_prob cutmix_prob mix_prob",
    "mix.switch_probability": "mixup_switch_prob",
    "method.label_smoothing": "smoothing label_smoothing_factor label_smooth ls",
    "speed.workers": "num_workers n_workers dataloader_num_workers threads num_threads",
    "speed.prefetch": "prefetch_factor dataloader_prefetch_factor",
    "speed.pin_memory": "pin_mem dataloader_pin_memory",
    "speed.compile": "torch_compile torchcompile",
    "speed.grad_checkpointing": "gradient_checkpointing",
    "track.log_with": "report_to tracker trackers logger loggers",
    "track.log_with=[wandb]": "log_wandb use_wandb wandb",
    "track.log_with=[tensorboard]": "tensorboard use_tensorboard",
    "track.tags": "wandb_tags",
    "hub.repo": "hub_model_id push_to_hub repo_id",
    "hub.private": "hub_private_repo private",
}
KEYS = {alias: key for key, aliases in _KEYS.items() for alias in aliases.split()}

_SIZES = (
    "images are sized by the views, such as  views.train='random_resized_crop(224,0.08,1,bicubic) | flip' "
    "views.eval='resize(256,bicubic) | center_crop(224)'"
)
_DEVICES = "no key chooses the device: CUDA_VISIBLE_DEVICES=1 picks a GPU, ACCELERATE_USE_CPU=1 the CPU"
_CLASSES = "the classes come from the data (data.source, data.index)"
_POLICY = "augmentation is views.train, such as  views.train='random_resized_crop(224,0.08,1,bicubic) | flip'"
_BOXES = "this package classifies whole images: it has no boxes, masks or key points"
_LAUNCH = "several processes are started by  accelerate launch -m rescom_timm train RECIPE  or torchrun"
_ELSEWHERE = {
    _SIZES: "imgsz img_size image_size input_size crop_size resolution size crop_pct height width interpolation",
    _DEVICES: "device devices gpu gpus gpu_id cuda cpu mps tpu local_rank no_cuda use_cpu accelerator n_gpu num_gpus",
    _CLASSES: "num_classes nc n_classes num_labels classes class_names names label_names class_map",
    _POLICY: "aa auto_augment augment augmentation augmentations transform transforms randaugment rand_augment hflip "
    "vflip fliplr flipud color_jitter grayscale reprob random_erasing erasing hsv_h hsv_s hsv_v degrees translate "
    "shear perspective no_aug ratio aug_repeats train_interpolation",
    _BOXES: "task mosaic close_mosaic copy_paste mask_ratio overlap_mask box cls dfl pose kobj iou conf max_det nms "
    "single_cls rect agnostic_nms retina_masks boxes bbox",
    _LAUNCH: "ddp distributed world_size nproc_per_node num_processes backend ddp_backend dist_url fsdp deepspeed "
    "sync_bn ddp_timeout",
    "a run is resumed by --resume; without it a run gets a new folder": "resume resume_from_checkpoint exist_ok "
    "overwrite overwrite_output_dir",
    "one step without training is --dry-run": "dry_run fast_dev_run",
    "fewer messages are --quiet": "verbose quiet silent log_level disable_tqdm",
    "an epoch is one line; metrics.jsonl holds them all": "logging_steps logging_strategy log_interval log_every "
    "log_freq print_freq",
    "a trained run is evaluated by  rescom-timm evaluate RUN  and used by  rescom-timm predict RUN IMAGES": "do_train "
    "do_eval do_predict eval_only test_only evaluate predict",
    "five crops are averaged by  rescom-timm evaluate RUN --five-crops": "tta five_crops",
    "a recipe holds no token: log in with  hf auth login  or set HF_TOKEN": "token hf_token hub_token api_key "
    "use_auth_token",
    "images are read in 3 channels": "in_chans in_channels input_channels num_channels channels",
    "fewer images are chosen by data.index, such as exponential(100) or a file": "fraction max_train_samples "
    "num_samples train_num_samples subset_size",
    "optimizer.name chooses one of timm's optimizers, with timm's other defaults": "opt_eps opt_betas "
    "betas beta1 beta2 "
    "adam_beta1 adam_beta2 adam_epsilon opt_kwargs optim_args",
    "net.pretrained=true takes timm's weights of net.backbone, net.weights_file=FILE those of a file": "weights "
    "pretrained_cfg pretrained_weights",
    "the checkpoint that is best on data.validation is kept too; evaluation.select names the metric": "save_best best "
    "load_best_model_at_end",
    "seed decides all that is drawn": "deterministic full_determinism random",
    "a trained run holds its plain timm model in RUN/model; rescom-timm export writes others": "format "
    "onnx torchscript opset int8 quantize",
    "images are corrupted, not trained on, by  rescom-timm robustness": "corruption corruptions",
}
ELSEWHERE = {alias: advice for advice, aliases in _ELSEWHERE.items() for alias in aliases.split()}
"""What is no key of a recipe, and what to do instead."""

_METHODS = {
    "cross_entropy": "ce crossentropy softmax xent plain erm baseline",
    "balanced_softmax": "balanced balsoftmax balsfx bsce bs balanced_ce",
    "focal": "focal_loss focalloss",
    "class_balanced": "weighted_ce weighted_cross_entropy weighted wce cb cb_loss cb_focal class_weights",
    "ldam": "ldam_drw drw",
    "logit_adjustment": "la logit_adjust logit_adjusted",
    "rescom": "supcon contrastive siamese",
    "paco": "gpaco parametric_contrastive",
    "experts": "ride ensemble mixture_of_experts moe",
    "las": "mislas label_aware_smoothing",
    "crt": "decoupling decouple classifier_retraining",
    "causal_norm": "causal tde",
}
METHODS = {alias: name for name, aliases in _METHODS.items() for alias in aliases.split()}


def plain(name: str) -> str:
    """The last part of a key in lower case with underscores, as in the tables."""
    return name.rpartition(".")[2].lower().lstrip("-").replace("-", "_")
