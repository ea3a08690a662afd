"""What ``docs/your_project.md`` and ``examples/`` say of users' own managers, models and policies."""
import contextlib
import functools
import io
import json
import re
from pathlib import Path

import pytest
import torch
from builders import Worker, compiled, small_cartpole
from ding.policy import create_policy
from ding.utils import MODEL_REGISTRY, POLICY_REGISTRY
from easydict import EasyDict
from lzero.model import unizero_model as lightzero_model
from lzero.model.unizero_model import UniZeroModel as LightZerosModel
from lzero.model.unizero_world_models.transformer import SelfAttention
from lzero.model.unizero_world_models.world_model import WorldModel as LightZerosWorldModel
from lzero.policy import unizero as lightzero_policy
from small_models import ON_MAIN, Case, randomise
from trainings import SMALL, check_run, import_what_trainings_import, short_episodes, trained

from lzero_kvcache import ConfigError, check_config, enable
from lzero_kvcache.host.models import UniZeroModel
from lzero_kvcache.host.policies import UniZeroPolicy
from lzero_kvcache.host.world_model import NewWorldModel
from lzero_kvcache.registry import register_in_place_of
from lzero_kvcache.training import load_config

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = str(ROOT / 'examples' / 'own_manager.py')
FOREIGN_POLICY = """
from ding.utils import POLICY_REGISTRY
from lzero.policy.unizero import UniZeroPolicy


@POLICY_REGISTRY.register('unizero', force_overwrite=True)
class Foreign(UniZeroPolicy):
    pass
"""
PAGE = (ROOT / 'docs' / 'your_project.md').read_text(encoding='utf-8')


@pytest.fixture
def registries(registered):
    """As they were, after a test that registers models and policies."""
    before = [(registry, dict(registry)) for registry in (MODEL_REGISTRY, POLICY_REGISTRY)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def policy_of(main_config):
    with contextlib.redirect_stdout(io.StringIO()):
        return create_policy(compiled(main_config).policy, enable_field=['learn', 'collect', 'eval'])


def cache_of(policy):
    return getattr(policy._model, '_orig_mod', policy._model).world_model.kv_cache_manager


def shrunk(path, new=True):
    """The policy and model of a config file, as small as those of other tests."""
    theirs = load_config(path).main_config.policy.model
    main_config = small_cartpole(new, kv_cache_cfg=theirs.world_model_cfg.get('kv_cache_cfg', {}))
    main_config.policy.model.update({key: theirs[key] for key in ('type', 'import_names') if key in theirs})
    return main_config


@pytest.fixture
def page(tmp_path):
    """The Python of the page but for its first lines, as a config file."""
    path = tmp_path / 'mine.py'
    _, *blocks = re.findall(r'^```python\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE)
    path.write_text('\n'.join(blocks))
    return str(path)


# ---------------------------------------------------------------------------------------------------- managers


def test_the_example_counts_what_was_lost(registries):
    policy = policy_of(shrunk(EXAMPLE))
    manager = policy._model.world_model.kv_cache_manager
    assert type(manager).__name__ == 'LostRootsManager'
    assert manager.config.eviction == 'lru'
    worker = Worker(policy)
    worker.step([0, 1, 2])
    worker.step([0, 1, 2])
    assert not manager.lost
    manager.clear_init_caches('collect', 1)
    worker.step([0, 1, 2])
    assert json.loads(json.dumps(manager.get_stats_summary()))['lost_roots'] == {'collect 1': 1}


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize('new', [False, True])
def test_the_pages_model_is_used_in_both_systems(new, page, registries):
    policy = policy_of(shrunk(page, new))
    model = getattr(policy._model, '_orig_mod', policy._model)  # torch.compile may wrap it
    assert type(model).__name__ == 'MyUniZeroModel'
    assert type(model.world_model).__name__ == ('MyNewWorldModel' if new else 'MyOldWorldModel')
    randomise(model, Case(), 0)
    worker = Worker(policy)
    worker.step([0, 1, 2])
    before = worker.step([0, 1, 2])
    counted = model.world_model.kv_cache_manager.counters()
    # LightZero's main branch finds no roots of vectors.
    assert (counted['init']['queries'], counted['init']['hits']) == (3, 3 if new or not ON_MAIN else 0)
    assert counted['recur']['hits'] == counted['recur']['queries'] > 0
    # Its own encoder is the one that is asked.
    with torch.no_grad():
        model.tokenizer.encoder.scale.mul_(-3)
    after = worker.step([0, 1, 2])
    encoded = model.tokenizer.encode_to_obs_embeddings(torch.ones(1, 4))
    assert not torch.allclose(encoded, model.tokenizer.encoder.encoder(torch.ones(1, 4)).unsqueeze(1))
    assert before[0]['predicted_value'] != after[0]['predicted_value']


def test_a_subclass_of_lightzeros_model_is_refused_with_the_flag_and_works_without(registries):
    MODEL_REGISTRY.register('Direct', type('Direct', (LightZerosModel, ), {}))
    for new in (False, True):
        main_config = small_cartpole(new)
        main_config.policy.model.update(type='Direct', import_names=[])
        if new:
            with pytest.raises(ConfigError, match="'Direct' has LightZero's own caching: .*models.UniZeroModel"):
                policy_of(main_config)
        else:
            assert len(Worker(policy_of(main_config)).step([0, 1, 2])) == 3


def test_a_policy_of_ones_own(registries):
    seen = []

    class MyPolicy(UniZeroPolicy):

        def _forward_collect(self, *args, **kwargs):
            seen.append(kwargs['ready_env_id'])
            return super()._forward_collect(*args, **kwargs)

    POLICY_REGISTRY.register('unizero', MyPolicy, force_overwrite=True)
    policy = policy_of(small_cartpole(True))
    assert type(policy) is MyPolicy
    worker = Worker(policy)
    worker.step([0, 1, 2])
    worker.step([2, 0])
    assert seen == [[0, 1, 2], [2, 0]]
    assert policy._model.world_model.kv_cache_manager.counters()['init']['hits'] == 2


def test_somebody_elses_class_under_lightzeros_name_is_not_replaced(registries):
    theirs = type('Theirs', (LightZerosModel, ), {})
    MODEL_REGISTRY.register('UniZeroModel', theirs, force_overwrite=True)
    with pytest.raises(ConfigError, match="Theirs is registered as 'UniZeroModel', .*: derive it from .*Ours"):
        register_in_place_of(LightZerosModel, MODEL_REGISTRY, 'UniZeroModel', type('Ours', (LightZerosModel, ), {}))
    assert MODEL_REGISTRY.get('UniZeroModel') is theirs


def test_a_policy_that_is_not_the_plugins_is_refused_with_the_flag(registries):
    from lzero.policy.unizero import UniZeroPolicy as LightZerosPolicy
    POLICY_REGISTRY.register('unizero', type('Theirs', (LightZerosPolicy, ), {}), force_overwrite=True)
    main_config, create_config = small_cartpole(True), EasyDict(policy=dict(type='unizero'))
    with pytest.raises(ConfigError, match="Theirs, which is registered as 'unizero', is no policy of lzero_kvcache"):
        check_config(main_config, create_config)
    main_config.policy.model.world_model_cfg.use_new_cache_manager = False
    check_config(main_config, create_config)


def changed_attention(world_model):
    world_model.transformer.blocks[0].attn.__class__ = type('MyAttention', (SelfAttention, ), {
        'forward': lambda self, *args, **kwargs: 2 * SelfAttention.forward(self, *args, **kwargs)})


def changed_block(world_model):
    block = world_model.transformer.blocks[0]
    block.forward = lambda *args, forward=block.forward, **kwargs: forward(*args, **kwargs)


def changed_norm(world_model):
    norm = world_model.transformer.blocks[0].ln1
    norm.forward = lambda x, forward=norm.forward: 2 * forward(x)


def changed_head(world_model):
    head = world_model.head_value
    head.__class__ = type('MyHead', (type(head), ), {
        'forward': lambda self, *args, **kwargs: super(type(self), self).forward(*args, **kwargs)})


def changed_query(world_model):
    attn = world_model.transformer.blocks[0].attn
    attn.query = type('LowRank', (torch.nn.Linear, ), {})(attn.query.in_features, attn.query.out_features)


def hooked_norm(world_model):
    world_model.transformer.blocks[0].ln1.register_forward_hook(lambda *args: None)


def hooked_weight(world_model):
    torch.nn.utils.spectral_norm(world_model.transformer.blocks[0].attn.query)


@pytest.mark.parametrize(('change', 'what'), [
    (hooked_norm, 'LayerNorm of the Transformer has a forward hook'),
    (hooked_weight, 'Linear of the Transformer has a forward hook'),
    (changed_attention, 'MyAttention.forward is not'), (changed_block, 'Block.forward is not'),
    (changed_head, 'MyHead.forward is not'), (changed_norm, 'LayerNorm of the Transformer has a forward of its own'),
    (changed_query, 'SelfAttention.query is a LowRank and no Linear'),
])
def test_a_change_that_a_step_would_pass_over_is_refused(change, what, registries):

    class MyModel(UniZeroModel):

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            change(self.world_model)

    MODEL_REGISTRY.register('MyModel', MyModel)
    main_config = small_cartpole(True)
    main_config.policy.model.update(type='MyModel', import_names=[])
    with pytest.raises(ConfigError, match=f'{what}.*use_new_cache_manager=False'):
        policy_of(main_config)
    main_config = small_cartpole(False)
    main_config.policy.model.update(type='MyModel', import_names=[])
    assert len(Worker(policy_of(main_config)).step([0, 1, 2])) == 3


def calling(name, calls):
    """A method that counts its calls and does what its base class does."""

    def method(self, *args, **kwargs):
        calls.append(name)
        return getattr(super(type(self), self), name)(*args, **kwargs)

    return method


def with_model(new, **attributes):
    """A config whose model is the plugin's with some attributes of one's own."""
    MODEL_REGISTRY.register('MyModel', type('MyModel', (UniZeroModel, ), attributes), force_overwrite=True)
    main_config = small_cartpole(new)
    main_config.policy.model.update(type='MyModel', import_names=[])
    return main_config


@pytest.mark.parametrize('name', ['forward', 'update_cache_context', 'wm_forward_for_initial_infererence'])
def test_what_the_new_system_would_not_call_is_refused_where_the_world_model_is_made(name, registries):
    theirs = type('MyWorldModel', (NewWorldModel, ), {name: calling(name, [])})
    with pytest.raises(ConfigError, match=f'MyWorldModel.{name} is not'):
        policy_of(with_model(True, new_world_model=theirs))


@pytest.mark.parametrize(('owner', 'name'), [
    (SelfAttention, 'forward'), (LightZerosWorldModel, 'update_cache_context'),
    (LightZerosWorldModel, '_transformer_pass'),
])
def test_what_is_put_into_lightzeros_classes_is_refused(owner, name, registries, monkeypatch):
    original = getattr(owner, name)

    @functools.wraps(original)
    def theirs(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, theirs)
    with pytest.raises(ConfigError, match=f'{name} is not LightZero'):
        policy_of(small_cartpole(True))


@pytest.mark.parametrize('which', ['model', 'world model', 'search'])
def test_a_recurrent_inference_or_search_of_ones_own_is_called(which, registries, monkeypatch):
    calls = []
    if which == 'model':
        main_config = with_model(True, recurrent_inference=calling('recurrent_inference', calls))
    elif which == 'world model':
        theirs = {'forward_recurrent_inference': calling('forward_recurrent_inference', calls)}
        main_config = with_model(True, new_world_model=type('MyWorldModel', (NewWorldModel, ), theirs))
    else:
        main_config = small_cartpole(True)
        theirs = type('MySearch', (lightzero_policy.MCTSCtree, ), {'search': calling('search', calls)})
        monkeypatch.setattr(lightzero_policy, 'MCTSCtree', theirs)
    policy = policy_of(main_config)
    Worker(policy).step([0, 1, 2])
    assert len(calls) == (1 if which == 'search' else main_config.policy.num_simulations)
    assert cache_of(policy).counters()['recur']['queries'] == 3 * main_config.policy.num_simulations


@pytest.mark.parametrize('kind', ['mlp', 'head'])
def test_a_sequence_of_layers_with_a_forward_of_its_own_is_called(kind, registries):

    class Residual(torch.nn.Sequential):
        calls = 0

        def forward(self, x):
            Residual.calls += 1
            return 0.5 * super().forward(x)

    model = policy_of(small_cartpole(True))._model.eval()
    world_model = getattr(model, '_orig_mod', model).world_model
    block_mlp = 'feed_forward' if ON_MAIN else 'mlp'
    owner, name = (world_model.transformer.blocks[0], block_mlp) if kind == 'mlp' else \
        (world_model.head_value, 'head_module')
    setattr(owner, name, Residual(*getattr(owner, name)))
    weights = world_model.weights_source.read(False)
    x = torch.randn(2, 1, world_model.embed_dim)
    ours = weights.layers[0].mlp(x) if kind == 'mlp' else weights.value(x)
    assert Residual.calls == 1
    torch.testing.assert_close(ours, getattr(owner, name)(x))


@pytest.mark.parametrize('new', [False, True])
def test_a_world_model_in_the_place_of_lightzeros_is_not_replaced(new, registries, monkeypatch):
    theirs = type('TheirWorldModel', (LightZerosWorldModel, ), {})
    if ON_MAIN:
        monkeypatch.setattr(lightzero_model.UniZeroModel, 'world_model_cls', theirs)
    else:
        monkeypatch.setattr(lightzero_model, 'WorldModel', theirs)
    if new:
        with pytest.raises(ConfigError, match='TheirWorldModel: derive it from lzero_kvcache.host.world_model'):
            policy_of(small_cartpole(True))
    else:
        policy = policy_of(small_cartpole(False))
        assert type(getattr(policy._model, '_orig_mod', policy._model).world_model) is theirs
        assert len(Worker(policy).step([0, 1, 2])) == 3


def test_a_foreign_policy_that_import_names_bring_is_refused_with_the_flag(registries, tmp_path, monkeypatch):
    (tmp_path / 'foreign_policy.py').write_text(FOREIGN_POLICY)
    monkeypatch.syspath_prepend(str(tmp_path))
    create_config = EasyDict(policy=dict(type='unizero', import_names=['foreign_policy']))
    with pytest.raises(ConfigError, match='foreign_policy.Foreign, which is registered'):
        enable(small_cartpole(True), create_config)


# ---------------------------------------------------------------------------------------------------- real trainings


@pytest.mark.slow
def test_the_page_trains(page, tmp_path):
    import_what_trainings_import()
    [(code, printed)] = trained(tmp_path, ['--config', page, '--cache', 'new', *SMALL], short_episodes)
    assert code == 0, printed
    check_run(tmp_path / 'run', 'new')
