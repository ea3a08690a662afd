"""What no command accepts: one line, exit code 2, and nothing written."""
import contextlib
import os
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import ON_MAIN
from trainings import WM

from lzero_kvcache import ConfigError
from lzero_kvcache.host.building import try_environment
from lzero_kvcache.training import make_plan
from lzero_kvcache_options import DEVICES, SYSTEMS, TrainOptions, command_parser, main, version

ON_OLDER_GYMNASIUM = pytest.mark.skipif(ON_MAIN, reason='its environment is of an older gymnasium than the main branch')
LIKE_CARTPOLE = '''
import copy
from zoo.classic_control.cartpole.config import cartpole_unizero_config as theirs
main_config, create_config = copy.deepcopy(theirs.main_config), copy.deepcopy(theirs.create_config)
'''
WITH_A_CONFIG = [
    (['--config', 'nosuch'], '--config nosuch: there is no such file'),
    (['--config', 'config_new', '--colour'], '--colour'),
    (['--config', 'config_new', '--set', 'policy.num_simulatons=1'], "did you mean 'policy.num_simulations'"),
]
TRAIN = [
    (['--config', 'config_new', '--cache', 'both'], "'both'"),
    (['--config', 'config_new', '--max-env-step', '0'], "'0' is not a whole number of at least 1"),
    (['--config', 'config_new', '--seed', '4294967296'], 'seed=4294967296 must be below 2**32'),
    (['--config', 'config_new', '--set', 'exp_name='], "exp_name='' names no folder"),
    (['--config', 'config_new', '--set', 'exp_name=None'], 'exp_name=None names no folder'),
    (['--config', 'config_new', '--exp-name', ''], "exp_name='' names no folder"),
    (['--config', 'config_new', '--set', 'seed=5'], '--set seed=5: give --seed 5 in its place'),
    (['--config', 'config_new', '--exp-name', '.'], '.: this folder is there'),
    (['--config', 'config_new', '--resume', '.'], '--resume .: no such checkpoint'),
    (['--config', 'config_new', '--max-env-step', '1.5'], "'1.5' is not a whole number"),
    (['--config', 'config_new', '--max-env-step', 'inf'], "'inf' is not a whole number"),
    (['--config', 'config_new', '--set', 'policy.mcts_ctree=False'], 'policy.mcts_ctree=False cannot work'),
    (['--config', 'config_new', '--set', 'policy.model_path=nosuch.pth.tar'],
     'policy.model_path=nosuch.pth.tar: no such checkpoint'),
    (['--config', 'config_new', '--resume', 'nosuch.pth.tar'], '--resume nosuch.pth.tar: no such checkpoint'),
    (['--config', 'config_new', '--resume', __file__, '--eval', __file__], 'not allowed with'),
    (['--config', 'config_new', '--in-place'], 'give that, and no --exp-name'),
    (['--config', 'config_new', '--in-place', '--resume', __file__, '--exp-name', 'c'], 'and no --exp-name'),
    (['--config', 'config_new', '--in-place', '--resume', __file__], f'{__file__} is in no folder ckpt'),
    (['--config', 'config_new', '--set', 'env.env_id=NoSuchPole-v0'],
     "env.env_id='NoSuchPole-v0': Environment `NoSuchPole`"),
    (['--config', 'config_new', '--set', 'create_config.env.type=cartpole_lightzer'],
     "create_config.env.type='cartpole_lightzer' is registered by none"),
    (['--config', 'config_new', '--set', 'create_config.env_manager.type=subproces'],
     "env_manager.type='subproces' is registered by none of its import_names=[]; did you mean 'subprocess'"),
    (['--config', 'config_new', '--set', 'create_config.policy.type=unizro'],
     "create_config.policy.type='unizro' is not a UniZero policy: did you mean 'unizero'"),
    *((['--config', 'config_new', '--set', f'policy.type={kind}'],
       f"policy.type='{kind}' contradicts create_config.policy.type='unizero': leave it out, and set the latter")
      for kind in ('muzero', 'sampled_unizero', 'unizero_x')),
    *((['--config', 'config_new', '--set', f'+env.{key}=nosuch'], f"env.{key}='nosuch' is registered by none")
      for key in ('type', 'manager.type')),
    *((['--config', 'config_new', '--set', f'create_config.{part}.import_names=5'], 'it is a list ([')
      for part in ('policy', 'env')),
    *((['--config', 'config_new', '--set', f'create_config.{part}.import_names=[5]'],
       f'create_config.{part}.import_names=[5] must be a list of names of modules') for part in ('policy', 'env')),
    (['--config', 'config_new', '--set', 'policy.learning_rate=-1'],
     'learning_rate=-1 must be a number that is not below 0'),
    (['--config', 'config_old', '--set', 'policy.batch_size=0'],
     'policy.batch_size=0 must be a whole number above 0'),
    (['--config', 'config_old', '--set', 'policy.batch_size=2.5'], 'policy.batch_size=2.5 must be a whole number'),
    (['--config', 'config_new', '--set', 'policy.num_simulations=None'], 'num_simulations=None must be a whole number'),
    *((['--config', 'config_new', '--set', f'{WM}.{key}=0'], f'{WM}.{key}=0 must be a whole number above 0')
      for key in ('embed_dim', 'num_heads', 'num_layers')),
    (['--config', 'config_old', '--set', 'policy.replay_buffer_size=64'],
     'policy.replay_buffer_size=64 contradicts policy.batch_size=64: it must be larger than that'),
    (['--config', 'config_old', '--set', 'policy.replay_buffer_size=None'], 'replay_buffer_size=None must be a number'),
    *((['--config', 'config_old', '--set', f'{key}={text}'], f'{key}={said} must be a number')
      for key, text, said in [
          *((f'policy.{key}', '1e400', 'inf') for key in (
              'discount_factor', 'target_update_theta', 'replay_ratio', 'weight_decay', 'train_start_after_envsteps')),
          (f'{WM}.gamma', '-1e400', '-inf'), ('policy.learning_rate', '1' * 400, '1' * 400)]),
    (['--config', 'config_old', '--set', 'policy.game_segment_length=1e400'],
     'policy.game_segment_length=inf must be a whole number'),
    (['--config', 'config_new', '--set', "env.collector_env_num='8'"], "it is a number (8 now), not '8'"),
    (['--config', 'config_new', '--set', f'{WM}.device=tpu'], f"{WM}.device='tpu' is none of torch's"),
    (['--config', 'config_new', '--set', '+policy.batch_size.x=3'], 'policy.batch_size is 64, which holds no keys'),
    (['--config', 'config_new', '--set', '+policy.model=3'], 'policy.model holds'),
    (['--config', 'config_new', '--set', '+new=1', '+new.sub=2'], '--set +new.sub=2: new is 1, which holds no keys'),
    *((['--config', 'config_new', '--set', f'{path}=3'], f'--set {path}=3: write KEY=VALUE')
      for path in ('+policy..x', 'policy.', '.')),
    (['--config', 'config_new', '--set', 'create_config.env.import_names=None'],
     'create_config.env.import_names=None must be a list of names of modules'),
    *((['--config', 'config_new', '--set', f'policy.model.{key}={wrong}'],
       f'policy.model.{key}={wrong} must be a whole number above 0')
      for key, wrong in (('action_space_size', 0), ('observation_shape', None), ('observation_shape', [0, 4]))),
    *((['--config', config, '--set', *changes], message) for config in ('config_old', 'config_new')
      for changes, message in [
        (['policy.model.action_space_size=60', f'{WM}.action_space_size=6'],
         f'policy.model.action_space_size=60 contradicts {WM}.action_space_size=6: they must be the same'),
        *(([f'{key}.action_space_size=3'],  # its copy follows, the environment does not
           "action_space_size=3 of policy.model and of its world_model_cfg contradicts the environment of "
           "env.env_id='CartPole-v0': its action masks are of 2 actions, so both must be 2")
          for key in ('policy.model', WM)),
        (['policy.model.observation_shape=5'], 'policy.model.observation_shape=5 contradicts the environment of'),
        *((['env.collector_env_num=8', 'env.evaluator_env_num=3', f'policy.{kind}_env_num={number}'], message)
          for kind, of_env in (('collector', 8), ('evaluator', 3)) for number, message in ([
              (2, f'policy.{kind}_env_num=2 contradicts env.{kind}_env_num={of_env}: it must be at least that'),
          ] if ON_MAIN else [
              (9, f'{WM}.env_num=8 contradicts policy.{kind}_env_num=9: it must be at least that')])),
        ([f'{WM}.support_size=51'], f'{WM}.support_size=51 contradicts policy.model.'),
        *(([f'{WM}.{part}=5'], f'{WM}.{part}=5 contradicts {WM}.embed_dim=64')
          for part in ('num_heads', *([] if ON_MAIN else ['group_size']))),
        ([f'{WM}.max_tokens=30'], f'{WM}.max_tokens=30 contradicts {WM}.max_blocks=10: it must be 20'),
        *([] if ON_MAIN else [(['policy.num_unroll_steps=12'],
                               f'{WM}.max_blocks=10 contradicts policy.num_unroll_steps=12: it must be at')]),
        (['policy.n_episode=7'], 'policy.n_episode=7 contradicts env.collector_env_num=8: it must be at least that'),
        (['env.n_evaluator_episode=2'], 'env.n_evaluator_episode=2 contradicts env.evaluator_env_num=3: it must be'),
        ([f'{WM}.env_num=7'], f'{WM}.env_num=7 contradicts env.collector_env_num=8: it must be at least'),
        *(([f'{WM}.num_simulations={wrong}', 'policy.num_simulations=25'], f'{WM}.num_simulations={wrong} must be a')
          for wrong in (0, -1)),
        ([f'+{WM}.num_simulations=0'], f'{WM}.num_simulations=0 must be a'),  # the key that was set, of two copies
        (['policy.collector_env_num=0'], 'policy.collector_env_num=0 must be a whole number above 0'),
        ([f"+{WM}.env_num='8'"], "env_num='8' must be a whole number"),
        (['policy.reanalyze_ratio=3'], 'policy.reanalyze_ratio=3 must be a number from 0 to 1'),
        ([f'{WM}.embed_pdrop=2'], f'{WM}.embed_pdrop=2 must be a number from 0 to 1'),
        (['policy.discount_factor=None'], 'policy.discount_factor=None must be a number'),
        ([f'{WM}.max_tokens=None'], f'{WM}.max_tokens=None must be a whole number above 0'),
        (['policy.td_steps=2.5'], 'policy.td_steps=2.5 must be a whole number'),
        (['policy.update_per_collect=2.5'], 'policy.update_per_collect=2.5 must be a whole number'),
        *([] if ON_MAIN else [(['policy.model.support_scale=0'],
                               'policy.model.support_scale=0 must be a whole number above 0')]),
        (['policy.root_dirichlet_alpha=-1'], 'policy.root_dirichlet_alpha=-1 must be a number above 0'),
        (['policy.fixed_temperature_value=0'], 'policy.fixed_temperature_value=0 must be a number other than 0'),
        (['policy.grad_clip_value=None'], 'policy.grad_clip_value=None must be a number'),
        (['env.n_evaluator_episode=None'], 'env.n_evaluator_episode=None must be a whole number above 0'),
        (['policy.replay_ratio=None'], 'policy.replay_ratio=None must be a number'),
        *(([f'{path}=None'], f'{path}=None must be a number') for path in (
            'env.stop_value', 'policy.eval_freq', 'policy.weight_decay', 'policy.target_update_theta', f'{WM}.gamma',
            f'{WM}.rope_theta')),
        ([f'{WM}.support_size=None'], f'{WM}.support_size=None contradicts policy.model.'),
        ([f'{WM}.predict_latent_loss_type=kl'], "type='kl' must be one of mse, group_kl, cos_sim"),
        (['policy.model.model_type=foo'], "policy.model.model_type='foo' must be one of conv, mlp"),
        (['policy.sample_type=segment'], "policy.sample_type='segment' must be one of transition, episode"),
        *(([f'{key}={wrong}'], f"--set {key}={wrong}: give --{option} in its place, for which '{wrong}' is no")
          for key, option, wrong in (('policy.device', 'device', 'gpu'), ('device', 'device', 'cuda:0'),
                                     ('threads', 'threads', '0'), ('max_train_iter', 'max-train-iter', 'x'))),
        (['policy.device=cuda'], '--set policy.device=cuda: give --device cuda in its place'),
        *(([f'policy.update_per_collect={none}'], f'policy.update_per_collect={none} must be a whole number above 0')
          for none in (-1, 0)),
        *([] if ON_MAIN else [([f'policy.replay_ratio={none}'], f'policy.replay_ratio={none} must be a number above 0')
                              for none in (-0.25, 0)]),
        (['policy.game_segment_length=9', 'policy.ignore_done=True'],
         'policy.game_segment_length=9 contradicts policy.num_unroll_steps=5 and '
         "policy.td_steps=5 (LightZero's default) and policy.ignore_done=True and "
         "policy.use_priority=False (LightZero's default) and "
         "policy.sample_type='transition' (LightZero's default): it must be at least the sum of the first two"),
        *(([f'{key}=3'], f"there is no key '{key}'{nearest}") for key, nearest in (
            ('activation', " ('+activation"), ('env_manager.type', "; did you mean 'create_config.env_manager.type'?"),
            ('env_manager.typ', "; did you mean 'create_config.env_manager.type'?"),
            ('qqq.zzz', " ('+qqq"))),
        ([f'{WM}.context_length=22', f'{WM}.rotary_emb=False'],
         f'{WM}.context_length=22 contradicts {WM}.max_tokens=20'),
        (['policy.model.model_type=conv'],
         "policy.model.model_type='conv' contradicts policy.model.observation_shape=4: a vector has a number"),
        ([f'{WM}.obs_type=image'], f"{WM}.obs_type='image' contradicts policy.model.observation_shape=4"),
        ([f'{WM}.obs_type=foo'], f"{WM}.obs_type='foo' must be one of vector, image, image_memory, text"),
        (['policy.model.continuous_action_space=True'], "contradicts create_config.policy.type='unizero': it must be"),
    ]),
    (['--config', 'atari_unizero_segment_config', '--set', 'policy.num_segments=7'],
     'policy.num_segments=7 contradicts env.collector_env_num=8: it must be the same'),
    (['--config', 'config_new', '--set', f'{WM}.kv_cache_cfg.max_memory_mb=0.001'], 'max_memory_mb=0.001 is too small'),
    (['--config', 'config_new', '--set', f'{WM}.tokens_per_block=3'], 'tokens_per_block=3: the new cache serves 2'),
    (['--config', 'config_old', '--set', 'policy.multi_gpu=True'], 'policy.multi_gpu=True needs several processes'),
    (['--config', 'config_new', '--set', f'{WM}.context_length=7'],
     'context_length=7 must be even and at least 4 with use_new_cache_manager=True: try 8, or '),
    (['--config', 'config_new', '--set', f'{WM}.context_length=22'],
     'context_length=22 must not exceed max_tokens=20'),
    (['--config', 'config_new', '--threads', '100000'], "'100000' is more than"),
    *((['--config', 'config_old', '--cache', cache, '--set', f'{WM}.use_new_cache_manager={not flag}'],
       f'--cache {cache} contradicts --set, which picks') for cache, flag in (('old', False), ('new', True))),
    (['--config', 'config_new', '--set', 'max_env_step=5'], 'give --max-env-step 5 in its place'),
    (['--config', 'config_new', '--exp-name', 'new/' + 'x' * 300], 'cannot be made (File name too long)'),
    (['--config', 'config_new', '--exp-name', __file__], f'{__file__}: this is a file; give another --exp-name'),
    (['--config', 'config_new', '--exp-name', '/proc/foo/bar'], ' /proc/foo/bar: the folder of the experiment'),
    (['--config', 'config_new', '--set', '+policy.model.type=UniZeroModl'],
     "policy.model.type='UniZeroModl' is registered by none"),
]
# Root may write to all of them, as far as their permissions say.
UNWRITABLE = [(__file__, 'File exists'), (__file__ + '/sub', 'Not a directory'),
              *((out, 'No such file or directory') for out in ('/proc/sub', '/proc'))]
EXPERIMENT = WITH_A_CONFIG + [
    (['--config', 'config_new', '--cache', 'old', 'old'], '--cache old old: give each of them once'),
    (['--config', 'config_new', '--seeds', '1', '2', '1'], '--seeds 1 2 1: give each of them once'),
    *((['--config', 'config_new', '--out', out], f'--out {out} cannot be written to ({why}); give another folder')
      for out, why in UNWRITABLE),
    (['--config', 'config_new', '--seeds', '0', '4294967296'], 'seed=4294967296 must be below 2**32'),
    (['--config', 'config_new', '--set', 'policy.model.action_space_size=3'], 'contradicts the environment of'),
    (['--config', 'config_old', '--set', f'{WM}.kv_cache_cfg.max_memory_mb=0.001'], 'max_memory_mb=0.001 is too small'),
]
COMPARE = [
    ([], 'RUN'),
    (['nosuch'], 'nosuch: no such folder or event file'),
    (['.', '--group', 'old'], "'old' is not NAME=PATTERN"),
    (['.', '--colour'], '--colour'),
    (['.'], 'no run can be read: '),
    *((['.', '--out', out], f'--out {out} cannot be written to ({why}); give another folder')
      for out, why in UNWRITABLE),
    (['.', '--out', ''], "--out '' cannot be written to"),
]


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], 'COMMAND'),
    (['compere'], "'compere'"),
    *(([command], '--config') for command in ('train', 'experiment')),
    (['info', '--set', 'policy.num_simulations=3'], 'give --config too'),
    (['info', '--cache', 'new'], '--cache changes a config; give --config too'),
    *(([command, *arguments], message) for command, cases in (
        ('train', WITH_A_CONFIG + TRAIN), ('experiment', EXPERIMENT), ('info', WITH_A_CONFIG), ('compare', COMPARE),
    ) for arguments, message in cases),
])
def test_bad_usage_is_one_line_and_exit_code_2(arguments, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(arguments) == 2
    except SystemExit as end:  # of the parser
        assert end.code == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.startswith('lzero-kvcache: error: ')
    assert captured.err.count('\n') == 1
    assert re.fullmatch(r'(Config: .*\n|.* is left out: .*\n)?', captured.out)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('cache', ['old', 'new'])
@pytest.mark.parametrize(('name', 'number', 'own'), [
    pytest.param('bipedalwalker', 3, 4, marks=ON_OLDER_GYMNASIUM),
    pytest.param('bipedalwalker', 5, 4, marks=ON_OLDER_GYMNASIUM), ('pendulum', 3, None)])
def test_numbers_of_continuous_actions(name, number, own, cache):
    """Those with which the environment fails are refused; Pendulum reads the first of as many as there are."""
    pytest.importorskip('Box2D')
    plan = make_plan(f'{name}_cont_sampled_unizero_config', cache=cache,
                     overrides=[f'policy.model.action_space_size={number}'])
    refusal = pytest.raises(ConfigError, match=f'its actions have {own} numbers, so both must be {own}')
    with refusal if own else contextlib.nullcontext():
        try_environment(plan.main_config, plan.create_config)


@pytest.mark.parametrize('arguments', [['train'], ['train', '--cache', 'new'], ['info']], ids=' '.join)
@pytest.mark.parametrize('key', [
    'main_config.policy.replay_buffer_size', 'main_config.env.collector_env_num', 'main_config.env.evaluator_env_num',
    'create_config.env.type', 'create_config.env_manager.type'])
def test_a_key_without_a_default_is_asked_for(key, arguments, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part, name = key.rsplit('.', 1)
    (tmp_path / 'mine.py').write_text(LIKE_CARTPOLE + f'{part}.pop({name!r})\n')
    assert main([*arguments, '--config', 'mine.py']) == 2
    error = capfd.readouterr().err
    assert f'{key.replace("main_config.", "")} is missing: ' in error
    assert error.count('\n') == 1


@pytest.mark.parametrize('key', ['policy.learn', 'policy.learn.learner', 'policy.eps', 'env.manager'])
def test_a_dict_is_asked_for_where_lightzero_reads_one(key, tmp_path):
    """A file may say anything; --set is held to what is there."""
    *above, last = key.split('.')
    node = 'main_config' + ''.join(f'[{part!r}]' for part in above)
    (tmp_path / 'mine.py').write_text(
        LIKE_CARTPOLE + f"main_config['policy'].setdefault('learn', {{}})\n{node}[{last!r}] = None\n")
    with pytest.raises(ConfigError, match=f'^{key}=None must be a dict'):
        make_plan(str(tmp_path / 'mine.py'))


@pytest.mark.parametrize('changes', [
    *(f'policy.{change}'.split() for change in (
        'eval_freq=0', 'td_steps=0', 'discount_factor=1.5', 'root_noise_weight=1.5', 'learning_rate=0.0',
        'root_dirichlet_alpha=None', 'grad_clip_value=0', 'num_segments=None',
        *(f'{key}=1e400' for key in (
            'eval_freq', 'grad_clip_value', 'replay_buffer_size', 'root_noise_weight', 'root_dirichlet_alpha',
            'fixed_temperature_value')),
        'update_per_collect=4 policy.replay_ratio=None', 'update_per_collect=4 policy.replay_ratio=-1',
        'game_segment_length=3', 'game_segment_length=9 policy.ignore_done=True policy.use_priority=True',
        *(['replay_ratio=0', 'replay_ratio=-1'] if ON_MAIN else []),
        'manual_temperature_decay=True policy.fixed_temperature_value=None')),
    ['env.stop_value=1e400'], [f'+{WM}.rope_theta=1e400'],
    [f'{WM}.context_length=7'], [f'{WM}.context_length=22'],
    ['env.collector_env_num=4', 'policy.collector_env_num=5', f'{WM}.env_num=5'],
    ['env.evaluator_env_num=2', 'policy.evaluator_env_num=3'],
    *([['env.collector_env_num=4', 'policy.collector_env_num=9']] if ON_MAIN else [
        ['env.collector_env_num=8', 'policy.collector_env_num=1'],
        ['env.evaluator_env_num=3', 'policy.evaluator_env_num=1']]),
    *([f'{WM}.kv_cache_cfg.{change}'] for change in ('eviction=3', 'init_pool_size=0', 'max_memory_mb=-1', 'type=old')),
    [f'+{WM}.kv_cache_cfg.no_such=3'],
    *([f'+{WM}.{change}', 'policy.num_simulations=25', 'policy.game_segment_length=50'] for change in (
        'game_segment_length=0', 'num_simulations=2.5', "num_simulations='4'")),
    *([[f'{WM}.group_size=7'], [f'{WM}.max_blocks=4', f'{WM}.max_tokens=8'],
       ['+policy.model.support_scale=0'], ['+policy.model.support_scale=300']] if ON_MAIN else [  # the other one's
           ['+policy.model.value_support_range=[-300.,301.,1.]']]),
])
def test_what_lightzero_trains_with_is_not_refused(changes):
    """Each was trained by LightZero alone, whatever it learned."""
    make_plan('config_old', overrides=[change if '=' in change else f'+{change}' for change in changes])


@pytest.mark.parametrize(('new', 'least'), [(False, r"8 \(LightZero's default\)"), (True, '2')], ids=['old', 'new'])
def test_environments_are_held_to_what_stands_for_a_missing_env_num(new, least, tmp_path):
    """LightZero's default, and in the new system as many as the policy says."""
    (tmp_path / 'mine.py').write_text(
        LIKE_CARTPOLE + 'world_model_cfg = main_config.policy.model.world_model_cfg\n'
        f"world_model_cfg.use_new_cache_manager = {new}\nworld_model_cfg.pop('env_num')\n")
    policy = 9 if ON_MAIN else 2
    changes = ['env.collector_env_num=9', f'policy.collector_env_num={policy}', 'policy.evaluator_env_num=2',
               'env.evaluator_env_num=2']
    if ON_MAIN and new:
        assert make_plan(str(tmp_path / 'mine.py'), overrides=changes)
        return
    with pytest.raises(ConfigError, match=f'env_num={least} contradicts env.collector_env_num=9: it must be at least'):
        make_plan(str(tmp_path / 'mine.py'), overrides=changes)


@pytest.mark.parametrize('arguments', [
    [], ['train'], ['train', '--config', 'nosuch'], ['info', '--config', 'nosuch'], ['compare'], ['compare', 'nosuch'],
    ['info', '--set', 'policy.num_simulations=3'],
    *(['train', '--config', 'config_new', option, 'nosuch'] for option in ('--resume', '--eval')),
])
def test_bad_usage_waits_for_no_import(arguments, capfd, monkeypatch):
    """The commands' module brings torch, which takes seconds."""
    monkeypatch.setitem(sys.modules, 'lzero_kvcache.cli.commands', None)
    assert main(arguments) == 2
    assert 'is not installed' not in capfd.readouterr().err


# Paths and overrides may begin as options do; '--' alone is no value to argparse.
TEXTS = (st.text() | st.text().map('-{}'.format)).filter(lambda text: text != '--')
COUNTS = st.none() | st.integers(1, 2 ** 63)
ASKED = dict(
    config=TEXTS.filter(bool), exp_name=st.none() | TEXTS, overrides=st.just(()) | st.lists(TEXTS, min_size=1),
    max_env_step=COUNTS, max_train_iter=COUNTS, keep_checkpoints=COUNTS, seed=st.none() | st.integers(0, 2 ** 63),
    threads=st.none() | st.integers(1, 8), device=st.sampled_from([None, *DEVICES]),
    cache=st.sampled_from([None, *SYSTEMS]), in_place=st.booleans())


@given(st.builds(TrainOptions, resume=st.none() | TEXTS, **ASKED) | st.builds(TrainOptions, evaluate=TEXTS, **ASKED))
def test_what_is_asked_for_is_read_from_its_own_arguments(asked):
    assert TrainOptions.of(command_parser().parse_args(['train', *asked.arguments()])) == asked


@pytest.mark.parametrize(('asked', 'said'), [
    (dict(seed=-1), 'seed=-1 is not a whole number of at least 0'),
    (dict(threads=-3), 'threads=-3 is not a whole number of at least 1'),
    (dict(max_env_step=0), 'max_env_step=0 is not a whole number of at least 1'),
    (dict(keep_checkpoints=0), 'keep_checkpoints=0 is not a whole number of at least 1'),
    (dict(device='gpu'), "device='gpu' is none of auto, cpu, cuda"),
    (dict(cache='neww'), "cache='neww' is none of old, lightzero, new"),
    (dict(overrides='a=1'), "overrides='a=1' is no list; give ['a=1']"),
    (dict(resume='a', evaluate='b'), "resume='a' and evaluate='b' exclude each other; give one"),
])
def test_what_the_command_refuses_is_refused_in_python(asked, said):
    with pytest.raises(ConfigError) as caught:
        make_plan('config_new', **asked)
    assert str(caught.value) == said


@pytest.mark.parametrize('command', [[], ['train'], ['compare'], ['experiment'], ['info'], ['zoo']])
def test_every_command_says_its_version(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, '--version'])
    assert (end.value.code, capsys.readouterr().out) == (0, version() + '\n')
